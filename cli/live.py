"""The live view of `cupaged generate --stats-live`: the KV cache and the running batch, on a terminal."""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from cupaged.engine.block_pool import BlockPool
    from cupaged.engine.engine import Engine
    from cupaged.engine.sequence import Sequence

MIN_INTERVAL = 0.1  # seconds between frames
MAX_SHARE = 0.05  # of the time, that drawing may take
RATE_WINDOW = 2.0  # seconds over which tokens a second are counted
MAX_MAP_ROWS = 8

# The alternate screen leaves what is on the terminal as it was; the cursor is hidden meanwhile.
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
HOME, END_OF_LINE, BELOW = "\x1b[H", "\x1b[K", "\x1b[J"


@dataclass(frozen=True, eq=False)  # so that its identity is its hash: there may be many blocks to count
class BlockState:
    rank: int  # how much it is held
    name: str
    char: str
    colour: str

    def painted(self, text: str) -> str:
        return f"\x1b[{self.colour}m{text}\x1b[0m"


FREE = BlockState(0, "free", "·", "90")
CACHED = BlockState(1, "cached", "░", "34")
USED = BlockState(2, "used", "▓", "32")
SHARED = BlockState(3, "shared", "█", "33")


class LiveView:
    """Draws on the terminal while it is entered, at most ten times a second; `update` is LLM's on_step."""

    def __init__(self, terminal: TextIO):
        self._terminal = terminal
        self._next_frame = 0.0
        self._outputs: deque[tuple[float, int]] = deque()  # (time, output tokens so far)

    def __enter__(self) -> LiveView:
        self._write(ENTER)
        return self

    def __exit__(self, *_) -> None:
        self._write(LEAVE)

    def update(self, engine: Engine, start: float, end: float) -> None:
        """Draw the state after the step that ran from `start` to `end`, if it is time for a frame."""
        began = time.monotonic()
        if began < self._next_frame:
            return
        width, height = os.get_terminal_size(self._terminal.fileno())
        lines = frame(engine, end - start, self._tokens_per_second(engine, end), width, height)
        self._write(HOME + "\n".join(line + END_OF_LINE for line in lines) + BELOW)
        now = time.monotonic()
        self._next_frame = now + max(MIN_INTERVAL, (now - began) / MAX_SHARE)

    def _tokens_per_second(self, engine: Engine, now: float) -> float:
        self._outputs.append((now, engine.stats().num_output_tokens))
        while len(self._outputs) > 2 and self._outputs[1][0] <= now - RATE_WINDOW:
            self._outputs.popleft()
        (since, before), (_, count) = self._outputs[0], self._outputs[-1]
        return (count - before) / (now - since) if now > since else 0.0

    def _write(self, text: str) -> None:
        self._terminal.write(text)
        self._terminal.flush()


def is_drawable(terminal: TextIO) -> bool:
    return terminal.isatty() and os.environ.get("TERM") != "dumb"


def frame(engine: Engine, step_time: float, tokens_per_second: float, width: int, height: int) -> list[str]:
    """The view's lines: at most `height`, of at most `width` characters, colours not counted."""
    stats, scheduler = engine.stats(), engine.scheduler
    step, states = engine.last_step, block_states(engine.pool)
    counts = Counter(states)
    rows, group = block_map(states, width, max_rows=max(1, min(MAX_MAP_ROWS, height // 4)))
    preempted = sum(request.metrics.first_scheduled_time is not None for request in scheduler.waiting)
    legend = [f"{state.char} {counts[state]} {state.name}" for state in (SHARED, USED, CACHED, FREE)]
    per_char = f", {group} a character" if group > 1 else ""
    head = [
        f"running {stats.num_running}, waiting {stats.num_waiting}"
        + (f" ({preempted} requests preempted)" if preempted else "")
        + f"   {tokens_per_second:.1f} tokens/s"
        + f"   step {stats.num_steps}: {sum(step.num_tokens)} tokens in {step_time * 1e3:.1f} ms",
        f"KV blocks: {'  '.join(legend)}  of {stats.num_blocks} (limit {stats.max_blocks}){per_char}",
    ]
    batch = [_describe(seq) for request in list(scheduler.running) for seq in list(request.active)]
    room = max(0, height - len(head) - len(rows) - 2)
    if len(batch) > room:
        batch = [*batch[: max(0, room - 1)], f"... and {len(batch) - max(0, room - 1)} more"]
    table = ["", f"{'sequence':<12}{'state':<10}{'prompt':>8}{'output':>8}{'blocks':>8}", *batch]
    lines = [line[:width] for line in head] + rows + [line[:width] for line in table]
    return lines[:height]


def block_states(pool: BlockPool) -> list[BlockState]:
    """Of the blocks that have memory, by block id."""
    states = []
    for block_id in pool.block_ids():
        count = pool.ref_count(block_id)
        if count:
            states.append(SHARED if count > 1 else USED)
        else:
            states.append(FREE if pool.content(block_id) is None else CACHED)
    return states


def block_map(states: list[BlockState], width: int, max_rows: int) -> tuple[list[str], int]:
    """The blocks in rows of `width` characters, and for how many blocks each stands: as few as fit into max_rows.

    What is free behind the last block that is not is shown as far as there is room. A character that stands for
    several blocks says free if all of them are, otherwise what most of the others are, and of equally many the one
    that is held more.
    """
    capacity = width * max_rows
    end = max((block_id + 1 for block_id, state in enumerate(states) if state is not FREE), default=1)
    group = -(-end // capacity)
    states = states[: group * capacity]
    cells = []
    for first in range(0, len(states), group):
        counts = Counter(states[first : first + group])
        cells.append(max(counts, key=lambda state: (state is not FREE, counts[state], state.rank)))
    rows = []
    for first in range(0, len(cells), width):
        runs = groupby(cells[first : first + width])
        rows.append("".join(state.painted(state.char * len(list(run))) for state, run in runs))
    return rows, group


def _describe(seq: Sequence) -> str:
    request = seq.request
    name = f"{request.request_id}/{seq.index}" if len(request.sequences) > 1 else request.request_id
    prompt, output = f"{seq.num_prompt_tokens}", f"{seq.num_output_tokens}"
    state = "decode"
    if seq.num_cached_tokens < seq.num_prompt_tokens:
        state, prompt = "prefill", f"{seq.num_cached_tokens}/{prompt}"
    return f"{name:<12}{state:<10}{prompt:>8}{output:>8}{len(seq.block_table):>8}"
