"""`cupaged generate` on a tiny model: what it prints, where, and its exit codes."""

import io
import json
import math
import re
import subprocess
import sys

import pytest

GREEDY = ("--temperature", "0", "--device", "cpu")


def generate_json(cupaged, tiny_model, *args):
    run = cupaged("generate", "-m", tiny_model, "--json", *GREEDY, *args)
    assert run.code == 0, run.err
    return [json.loads(line) for line in run.out.splitlines()]


def test_text_goes_to_stdout_and_the_device_line_to_stderr(cupaged, tiny_model):
    run = cupaged("generate", "-m", tiny_model, "Hello", "-n", 8, "--ignore-eos", *GREEDY)
    assert run.code == 0
    (result,) = generate_json(cupaged, tiny_model, "Hello", "-n", 8, "--ignore-eos")
    assert run.out == result["text"] + "\n"
    assert len(run.err.splitlines()) == 1
    assert "running on" in run.err


def test_json_has_ids_reason_and_timings(cupaged, tiny_model):
    (result,) = generate_json(cupaged, tiny_model, "Hello", "-n", 8, "--ignore-eos")
    assert result["prompt"] == "Hello"
    assert len(result["prompt_token_ids"]) == 5
    assert len(result["token_ids"]) == 8
    assert result["finish_reason"] == "length"
    assert 0 < result["timings"]["ttft"] <= result["timings"]["total"]


def test_several_prompts_in_their_order_as_alone(cupaged, tiny_model):
    prompts = ["one", "a longer second prompt", "3"]
    together = generate_json(cupaged, tiny_model, *prompts, "-n", 12, "--ignore-eos")
    alone = [generate_json(cupaged, tiny_model, p, "-n", 12, "--ignore-eos")[0] for p in prompts]
    assert [r["prompt"] for r in together] == prompts
    assert [r["index"] for r in together] == [0, 1, 2]
    assert [r["token_ids"] for r in together] == [r["token_ids"] for r in alone]

    run = cupaged("generate", "-m", tiny_model, *prompts, "-n", 12, "--ignore-eos", *GREEDY)
    assert run.out.startswith("# [1/3] one\n")
    assert all(r["text"] in run.out for r in together)


def test_prompts_from_a_file_and_from_stdin(cupaged, tiny_model, tmp_path, monkeypatch):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "first"}\n\n"second"\n')
    results = generate_json(cupaged, tiny_model, "--prompts", file, "-n", 2)
    assert [r["prompt"] for r in results] == ["first", "second"]

    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    (result,) = generate_json(cupaged, tiny_model, "-n", 2)
    assert result["prompt"] == "from a pipe"


def test_logprobs(cupaged, tiny_model):
    (result,) = generate_json(cupaged, tiny_model, "Hello", "-n", 3, "--logprobs", 2, "--ignore-eos")
    assert len(result["logprobs"]) == 3
    for entry, token_id in zip(result["logprobs"], result["token_ids"], strict=True):
        assert entry["token_id"] == token_id == entry["top"][0]["token_id"]  # greedy takes the likeliest
        assert entry["rank"] == 1
        assert entry["top"][1]["logprob"] <= entry["logprob"] < 0
        assert math.isfinite(entry["logprob"])


def test_prompt_logprobs(cupaged, tiny_model):
    """What was generated, given as a prompt, has the log probabilities that it was generated with."""
    (first,) = generate_json(cupaged, tiny_model, "Hello", "-n", 3, "--logprobs", 2, "--ignore-eos")
    (second,) = generate_json(cupaged, tiny_model, "Hello" + first["text"], "-n", 1, "--prompt-logprobs", 2)
    assert second["prompt_token_ids"] == first["prompt_token_ids"] + first["token_ids"]
    assert "prompt_logprobs" not in first
    assert "logprobs" not in second
    nothing, *entries = second["prompt_logprobs"]
    assert nothing is None
    assert [entry["token_id"] for entry in entries] == second["prompt_token_ids"][1:]
    for entry, expected in zip(entries[-3:], first["logprobs"], strict=True):
        assert entry["logprob"] == pytest.approx(expected["logprob"], abs=1e-5)
        assert (entry["rank"], entry["token"]) == (expected["rank"], expected["token"])


def test_a_seed_repeats_and_another_differs(cupaged, tiny_model):
    def ids(seed):
        run = cupaged(
            "generate", "-m", tiny_model, "x", "-n", 16, "--json", "--ignore-eos", "--temp", 2, "--seed", seed
        )
        return json.loads(run.out)["token_ids"]

    assert ids(1) == ids(1) != ids(2)


def test_chat_applies_the_template(cupaged, tiny_model):
    (plain,) = generate_json(cupaged, tiny_model, "<|system|>Be brief.\n<|user|>Hi\n<|assistant|>", "-n", 4)
    (chat,) = generate_json(cupaged, tiny_model, "Hi", "--system", "Be brief.", "-n", 4)
    assert chat["prompt_token_ids"] == plain["prompt_token_ids"]
    assert chat["token_ids"] == plain["token_ids"]


def test_stop_cuts_the_text(cupaged, tiny_model):
    (whole,) = generate_json(cupaged, tiny_model, "Hello", "-n", 24, "--ignore-eos")
    stop = whole["text"][3:5]
    (cut,) = generate_json(cupaged, tiny_model, "Hello", "-n", 24, "--ignore-eos", "--stop", stop)
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", stop)


def test_without_a_limit_it_ends_at_the_context(cupaged, tiny_model):
    (result,) = generate_json(cupaged, tiny_model, "Hello", "--max-model-len", 64, "--ignore-eos")
    assert result["finish_reason"] == "length"
    assert len(result["prompt_token_ids"]) + len(result["token_ids"]) == 64


def test_penalties_change_the_draws(cupaged, tiny_model):
    def ids(*args):
        return generate_json(cupaged, tiny_model, "Hello", "-n", 24, "--ignore-eos", *args)[0]["token_ids"]

    assert len(set(ids())) < len(set(ids("--frequency-penalty", 2)))
    assert ids() != ids("--repeat-penalty", 1.5)
    assert ids() != ids("--presence-penalty", 2)


def test_several_outputs(cupaged, tiny_model):
    args = ("-m", tiny_model, "--device", "cpu", "--temp", 2, "--ignore-eos", "-n", 12)
    run = cupaged("generate", *args, "Hello", "--n", 3, "--seed", 5, "--json", "--logprobs", 0)
    result = json.loads(run.out)
    assert [output["token_ids"] for output in result["outputs"]] == [
        json.loads(cupaged("generate", *args, "Hello", "--seed", seed, "--json").out)["token_ids"] for seed in (5, 6, 7)
    ]
    assert len({output["text"] for output in result["outputs"]}) == 3
    for output in result["outputs"]:
        total = sum(entry["logprob"] for entry in output["logprobs"])
        assert output["cumulative_logprob"] == pytest.approx(total, abs=1e-4)
    assert all(
        result[name] == result["outputs"][0][name] for name in ("text", "token_ids", "finish_reason", "logprobs")
    )

    text = "".join(f"## [{i}/3]\n{output['text']}\n" for i, output in enumerate(result["outputs"], 1))
    run = cupaged("generate", *args, "Hello", "--n", 3, "--seed", 5, "--stats")
    assert run.out == text
    assert "5 prompt, 36 generated" in run.err
    assert cupaged("generate", *args, "Hello", "x", "--n", 3, "--seed", 5).out.startswith(
        f"# [1/2] Hello\n{text}# [2/2]"
    )


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--preemption-mode", "recompute"), r"preemptions: \d+, \d+ tokens to be computed again$"),
        (("--preemption-mode", "swap"), r"preemptions: (\d+), \1 of them by swapping: .* copied in"),
        (("--preemption-mode", "swap", "--swap-space", "64Ki"), r", \d+ tokens to be computed again, \d+ of them by"),
        (("--swap-space", "1M", "--async-scheduling"), r"preemptions: \d+, "),
        (("--swap-space", "0", "--enforce-eager"), r"preemptions: \d+, \d+ tokens to be computed again$"),
    ],
)  # fmt: skip
def test_preemption_by_the_mode_that_was_asked_for(cupaged, tiny_model, args, says):
    prompts = ["one", "a longer second prompt", "3", "the fourth"]
    args = (*prompts, "-n", 60, "--ignore-eos", "--kv-cache-memory", "160Ki", "--max-model-len", 100, *args)
    run = cupaged(
        "generate", "-m", tiny_model, "--stats", "--json", *GREEDY, *args
    )  # 10 blocks; each prompt needs 4 or 5
    assert run.code == 0, run.err
    assert re.search(says, run.err, re.MULTILINE), run.err
    expected = generate_json(cupaged, tiny_model, *prompts, "-n", 60, "--ignore-eos")
    assert [json.loads(line)["token_ids"] for line in run.out.splitlines()] == [r["token_ids"] for r in expected]


def test_beam_search(cupaged, tiny_model):
    (plain,) = generate_json(cupaged, tiny_model, "Hello", "-n", 12, "--ignore-eos", "--logprobs", 0)
    (found,) = generate_json(cupaged, tiny_model, "Hello", "-n", 12, "--ignore-eos", "--beam-width", 4)
    best, *others = found["outputs"]
    assert best["token_ids"] == found["token_ids"]
    assert len(others) == 3
    assert best["cumulative_logprob"] >= sum(entry["logprob"] for entry in plain["logprobs"]) - 1e-4
    run = cupaged("generate", "-m", tiny_model, "Hello", "-n", 12, "--ignore-eos", "--beam-width", 4, *GREEDY)
    assert run.out == found["text"] + "\n"


def test_stats(cupaged, tiny_model):
    run = cupaged("generate", "-m", tiny_model, "Hello", "-n", 4, "--stats", *GREEDY)
    for word in ("load:", "time to first token:", "tokens/s", "KV cache:", "waste"):
        assert word in run.err


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["x", "-n", "0"], 2, "max_tokens"),
        (["x", "-n", "-3"], 2, "max_tokens"),
        (["x", "--top-p", "0"], 2, "top_p"),
        (["x", "--top-p", "1.5"], 2, "top_p"),
        (["x", "--temperature", "nan"], 2, "temperature"),
        (["x", "--temperature", "-1"], 2, "temperature"),
        (["x", "--min-p", "2"], 2, "min_p"),
        (["x", "--repeat-penalty", "0"], 2, "repetition_penalty"),
        (["x", "--presence-penalty", "3"], 2, "presence_penalty"),
        (["x", "--beam-width", "0"], 2, "beam_width"),
        (["x", "--beam-width", "2", "--top-p", "0.9"], 2, "--top-p"),
        (["x", "--length-penalty", "2"], 2, "--beam-width"),
        (["x", "--logprobs", "2"], 2, "--json"),
        (["x", "--json", "--logprobs", "99"], 2, "logprobs"),
        (["x", "--prompt-logprobs", "2"], 2, "--json"),
        (["x", "--json", "--prompt-logprobs", "-1"], 2, "prompt_logprobs"),
        (["x", "--json", "--prompt-logprobs", "1", "--beam-width", "2"], 2, "--prompt-logprobs"),
        (["x", "--block-size", "12"], 2, "block_size"),
        (["x", "--kv-cache-memory", "lots"], 2, "size"),
        (["x", "--gpu-memory-utilization", "1.5"], 2, "gpu_memory_utilization"),
        (["x", "--max-model-len", "0"], 2, "max_model_len"),
        (["x", "--max-num-seqs", "0"], 2, "max_num_seqs"),
        (["x", "--n", "0"], 2, "n must be"),
        (["x", "--n", "2", "--beam-width", "2"], 2, "--n"),
        (["x", "--n", "300"], 2, "max_num_seqs"),
        (["x", "--preemption-mode", "never"], 2, "--preemption-mode"),
        (["x", "--preemption-mode", "swap", "--swap-space", "0"], 2, "swap_space_bytes"),
        (["x", "--preemption-mode", "swap", "--swap-space", "1k"], 2, "swap_space_bytes"),
        (["x", "--swap-space", "lots"], 2, "size"),
        (["x" * 600], 2, "max_model_len"),
        ([""], 2, "empty"),
        (["x", "--frobnicate"], 2, "--frobnicate"),
        (["x", "--device", "cuda"], 1, "cuda"),
        (["x", "--kv-cache-memory", "1k"], 1, "kv_cache_memory_bytes"),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code(cupaged, tiny_model, args, code, says):
    run = cupaged("generate", "-m", tiny_model, *([] if "--device" in args else ["--device", "cpu"]), *args)
    assert run.code == code
    assert says in run.err
    assert "Traceback" not in run.err
    assert run.out == ""
    assert len([line for line in run.err.splitlines() if "rror" in line]) == 1


def test_no_such_model(cupaged, tmp_path):
    run = cupaged("generate", "-m", tmp_path / "nowhere", "x")
    assert run.code == 1
    assert "nowhere" in run.err
    run = cupaged("generate", "-m", tmp_path, "x")
    assert run.code == 1
    assert "config.json" in run.err


def test_debug_shows_the_traceback(cupaged, tmp_path):
    assert "Traceback" in cupaged("generate", "-m", tmp_path, "x", "--debug").err


def test_bad_prompt_files(cupaged, tiny_model, tmp_path):
    file = tmp_path / "prompts.jsonl"
    for content, says in (('{"prompt": 3}', "line 1"), ("{oops", "line 1"), ("", "no prompt"), ('""', "empty")):
        file.write_text(content)
        run = cupaged("generate", "-m", tiny_model, "--prompts", file)
        assert run.code == 2
        assert says in run.err


def start(*args) -> subprocess.Popen:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "cupaged.cli.main", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_closed_pipe_is_no_error(tiny_model):
    process = start("generate", "-m", tiny_model, "x", "--ignore-eos")
    process.stdout.read(1)
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait(60) == 0, errors
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors


def test_ctrl_c_stops_with_130(tiny_model, tmp_path):
    import signal

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"x"\n' * 400)
    process = start("generate", "-m", tiny_model, "--ignore-eos", "--prompts", prompts)
    line = process.stderr.readline()  # the device line: it generates from here on
    assert b"running on" in line
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors
