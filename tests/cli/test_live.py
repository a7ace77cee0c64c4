"""`generate --stats-live` and `--trace`, and `plot-trace`: on a pseudo-terminal and off it."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections import Counter

import pytest

from cupaged import LLM, SamplingParams
from cupaged.cli import live
from cupaged.cli.live import CACHED, ENTER, FREE, LEAVE, SHARED, USED, block_map, block_states, frame

GREEDY = ("--temperature", "0", "--device", "cpu", "--ignore-eos")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def plain(lines):
    return [COLOURS.sub("", line) for line in lines]


# -- the view ----------------------------------------------------------------------------------------------


def test_each_block_has_a_character_of_its_state():
    states = [FREE, USED, USED, SHARED, CACHED, FREE]
    rows, group = block_map(states, width=4, max_rows=2)
    assert (plain(rows), group) == (["·▓▓█", "░·"], 1)


@pytest.mark.parametrize("num_blocks", [1, 79, 80, 81, 161, 1000, 12345])
def test_the_map_fits(num_blocks):
    rows, group = block_map([USED] * num_blocks, width=40, max_rows=4)
    assert len(rows) <= 4
    assert all(len(row) <= 40 for row in plain(rows))
    assert len("".join(plain(rows))) == -(-num_blocks // group)
    assert group == 1 or -(-num_blocks // (group - 1)) > 160  # no more to a character than must be


@pytest.mark.parametrize(
    ("blocks", "char"), [("···", "·"), ("··░", "░"), ("░░▓", "░"), ("░·▓", "▓"), ("▓█·", "█"), ("▓▓█", "▓")]
)
def test_what_stands_for_several_blocks(blocks, char):
    states = [next(state for state in (FREE, CACHED, USED, SHARED) if state.char == char) for char in blocks]
    rows, group = block_map([*states, USED, USED, USED], width=2, max_rows=1)
    assert (plain(rows), group) == ([char + "▓"], 3)


def test_free_blocks_at_the_end_are_left_out_for_the_others():
    rows, group = block_map([USED] * 3 + [FREE] * 10000, width=4, max_rows=2)
    assert (plain(rows), group) == (["▓▓▓·", "····"], 1)
    assert plain(block_map([FREE] * 10000, width=4, max_rows=2)[0]) == ["····", "····"]


def test_frames_tell_what_the_engine_holds(tiny_model):
    frames = []

    def on_step(engine, start, end):
        counts = Counter(block_states(engine.pool))
        stats = engine.stats()
        assert counts[USED] + counts[SHARED] == stats.num_used_blocks
        assert counts[CACHED] == stats.num_cached_blocks
        for width, height in ((80, 24), (20, 5), (200, 60), (1, 1)):
            lines = plain(frame(engine, end - start, 12.3, width, height))
            assert 0 < len(lines) <= height
            assert all(len(line) <= width for line in lines)
        frames.append(plain(frame(engine, end - start, 12.3, 100, 12)))

    with LLM(tiny_model, device="cpu", block_size=8, max_num_batched_tokens=24, on_step=on_step) as llm:
        forked = SamplingParams(temperature=1, seed=1, n=2, max_tokens=12, ignore_eos=True)
        single = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        llm.generate(["x" * 50, *"abcdefg"], [forked] + [single] * 7)
    text = ["\n".join(lines) for lines in frames]
    assert re.search(r"^0/0 +prefill +24/50 +0 +7$", text[0], re.MULTILINE)
    assert "step 1: 24 tokens in" in text[0]
    assert any(re.search(r"^0/1 +decode +50 +5 ", one, re.MULTILINE) for one in text)
    assert any("█ 6 shared" in one and "██████" in one for one in text)
    assert any(re.search(r"^\.\.\. and \d+ more$", one, re.MULTILINE) for one in text)
    assert all("12.3 tokens/s" in one for one in text)
    assert text[-1].startswith("running 0, waiting 0")


class Terminal:
    def __init__(self):
        self.written = []
        self.write, self.flush, self.fileno = self.written.append, lambda: None, lambda: 2


def test_frames_are_ten_a_second_at_most_and_take_little_of_the_time(tiny_model, monkeypatch):
    clock, cost = [100.0], [0.0]

    def slow_frame(*_):
        clock[0] += cost[0]
        return ["frame"]

    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(live.os, "get_terminal_size", lambda _: os.terminal_size((80, 24)))
    monkeypatch.setattr(live, "frame", slow_frame)
    with LLM(tiny_model, device="cpu") as llm:
        for cost[0], at_most, at_least in ((0.001, 100, 90), (0.05, 10, 9)):
            terminal = Terminal()
            view, end = live.LiveView(terminal), clock[0] + 10
            while clock[0] < end:
                view.update(llm.engine, clock[0] - 0.01, clock[0])
                clock[0] += 0.01
            assert at_least <= len(terminal.written) <= at_most


# -- the command -------------------------------------------------------------------------------------------


class OnTerminal:
    """The command with stderr on a pseudo-terminal of 60 columns and 20 lines."""

    def __init__(self, *args, stdout=subprocess.PIPE):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 60, 0, 0))
        command = [sys.executable, "-m", "cupaged.cli.main", *map(str, args)]
        env = {**os.environ, "TERM": "xterm"}
        self.process = subprocess.Popen(command, stdout=stdout, stderr=slave, env=env)
        os.close(slave)
        self.shown = ""

    def read_until(self, text=None):
        while text is None or text not in self.shown:
            try:
                self.shown += os.read(self.master, 1 << 16).decode(errors="replace")
            except OSError:  # that is how a pseudo-terminal says that the other side is closed
                assert text is None, self.shown
                break

    def finish(self) -> tuple[int, str]:
        self.read_until()
        os.close(self.master)
        with self.process:
            return self.process.wait(60), self.process.stdout.read().decode()


def test_live_on_a_terminal(cupaged, tiny_model):
    args = ("generate", "-m", tiny_model, "Hello", "-n", 200, *GREEDY)
    run = OnTerminal(*args, "--stats-live")
    code, out = run.finish()
    assert code == 0, run.shown
    assert out == cupaged(*args).out  # the text, and nothing of the view
    assert run.shown.count(ENTER) == run.shown.count(LEAVE) == 1
    before, rest = run.shown.split(ENTER)
    view, after = rest.split(LEAVE)
    assert "running on" in before
    assert "KV blocks:" in view
    assert "tokens/s" in view
    assert "load:" in after
    assert "\x1b" not in before + after


def test_ctrl_c_restores_the_terminal_and_the_trace_is_written(tiny_model, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"x"\n' * 400)
    trace = tmp_path / "trace.json"
    run = OnTerminal("generate", "-m", tiny_model, "--prompts", prompts, *GREEDY, "--stats-live", "--trace", trace)
    run.read_until("KV blocks:")
    run.process.send_signal(signal.SIGINT)
    code, out = run.finish()
    assert (code, out) == (130, "")
    assert run.shown.rstrip().endswith(LEAVE)
    assert any(event["ph"] == "X" for event in json.loads(trace.read_text())["traceEvents"])


def test_live_off_a_terminal_is_the_summary(cupaged, tiny_model):
    run = cupaged("generate", "-m", tiny_model, "Hello", "-n", 4, *GREEDY, "--stats-live")
    assert run.code == 0
    assert "\x1b" not in run.err
    assert "load:" in run.err
    assert run.out == cupaged("generate", "-m", tiny_model, "Hello", "-n", 4, *GREEDY).out


@pytest.fixture
def trace_file(cupaged, tiny_model, tmp_path):
    path = tmp_path / "trace.json"
    run = cupaged("generate", "-m", tiny_model, "Hello", "you", "-n", 4, *GREEDY, "--trace", path)
    assert run.code == 0
    return path


def test_trace(trace_file):
    events = json.loads(trace_file.read_text())["traceEvents"]
    assert [event["args"]["tokens"] for event in events if event["ph"] == "X"] == [8, 2, 2, 2]
    assert {event["id"] for event in events if event["ph"] == "b"} == {"0", "1"}


def test_a_trace_of_a_stream(cupaged, tiny_model, tmp_path):
    path = tmp_path / "trace.json"
    assert cupaged("generate", "-m", tiny_model, "Hello", "-n", 4, *GREEDY, "--trace", path).code == 0
    events = json.loads(path.read_text())["traceEvents"]
    assert [event["args"]["tokens"] for event in events if event["ph"] == "X"] == [5, 1, 1, 1]


def test_a_trace_that_cannot_be_written_is_found_at_once(cupaged, tiny_model, tmp_path):
    run = cupaged("generate", "-m", tiny_model, "Hello", "--trace", tmp_path / "nowhere" / "trace.json")
    assert run.code == 2
    assert "--trace" in run.err
    assert "running on" not in run.err


def test_plot_trace(cupaged, trace_file, tmp_path):
    pytest.importorskip("matplotlib", reason="plot-trace needs the extra [plot]")
    out = tmp_path / "blocks.png"
    run = cupaged("plot-trace", trace_file, out)
    assert run.code == 0, run.err
    assert run.out == f"{out}\n"
    assert out.read_bytes().startswith(b"\x89PNG")


def test_plot_trace_without_matplotlib(cupaged, trace_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = cupaged("plot-trace", trace_file, tmp_path / "blocks.png")
    assert run.code == 1
    assert "pip install 'cupaged[plot]'" in run.err


@pytest.mark.parametrize("content", ["", "{}", "[]", "[1]", '{"traceEvents": []}', '{"traceEvents": 3}', "\xff"])
def test_plot_trace_of_something_else(cupaged, tmp_path, content):
    pytest.importorskip("matplotlib", reason="plot-trace needs the extra [plot]")
    file = tmp_path / "other.json"
    file.write_text(content, encoding="latin-1")
    run = cupaged("plot-trace", file, tmp_path / "blocks.png")
    assert run.code == 2
    assert "other.json" in run.err
