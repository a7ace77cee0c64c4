"""`cupaged bench` on a tiny model on the CPU: its tables, its JSON, its refusals."""

import json
import re

import pytest

TINY = ("--device", "cpu", "--kv-cache-memory", "1M")


@pytest.fixture
def bench(cupaged, tiny_model, tmp_path):
    """bench("latency", ...) -> (what it printed, its report)."""

    def run(command, *args):
        file = tmp_path / "report.json"
        result = cupaged("bench", command, "-m", tiny_model, *TINY, "--json", file, *args)
        assert result.code == 0, result.err
        return result.out, json.loads(file.read_text())

    return run


@pytest.fixture
def request_file(tmp_path):
    """Three requests: 20 tokens in, 12 out."""
    file = tmp_path / "requests.json"
    requests = [{"i": 0, "prompt_len": 3, "output_len": 5}, {"prompt_len": 16, "output_len": 1}]
    requests.append({"prompt_len": 1, "output_len": 6})
    file.write_text(json.dumps({"name": "three", "seed": 7, "requests": requests}))
    return file


def check_report(report, command):
    """What every report of a model holds."""
    assert report["benchmark"] == command
    assert report["options"]["device"] == "cpu"
    assert report["model"]["dtype"] == "float32"
    assert report["model"]["weights_bytes"] > 100_000
    environment = report["environment"]
    assert environment["device"].startswith("the CPU")
    assert environment["cpus"] >= 1
    assert len(environment["load_average"]) == 3
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?", environment["commit"] or "0" * 12)
    assert "numpy" in environment["packages"]
    assert report["memory"]["peak_rss_bytes"] > report["model"]["weights_bytes"]
    assert report["engine"]["num_preemptions"] == 0
    assert report["engine"]["num_used_blocks"] == 0
    assert 0 < report["engine"]["peak_used_blocks"] <= report["engine"]["num_blocks"]


def check_spread(figure, count):
    assert figure["count"] == count
    assert 0 < figure["min"] <= figure["median"] <= figure["max"]


def check_distribution(figure, count):
    assert figure["count"] == count
    assert 0 < figure["p50"] <= figure["p99"] <= figure["max"]
    assert 0 < figure["mean"] <= figure["max"]


def test_latency(bench):
    out, report = bench("latency", "--batch", "1,3", "--prompt-len", 20, "--output-len", 6, "--repeats", 3)
    check_report(report, "latency")
    for row, batch in zip(report["figures"], (1, 3), strict=True):
        assert (row["batch"], row["prompt_len"], row["output_len"]) == (batch, 20, 6)
        assert row["output_tokens"] == 6 * batch
        for name in ("ttft_ms", "decode_step_ms", "output_tokens_per_s"):
            check_spread(row[name], 3)
        slowest = row["ttft_ms"]["max"] + 5 * row["decode_step_ms"]["max"]
        assert row["output_tokens_per_s"]["min"] > 0.5 * 6 * batch / (slowest / 1e3)
        assert 0 < row["linear_share"] < 1
    # A warm-up, three repeats and the one whose matrix products are timed; no prompt comes twice.
    assert report["engine"]["num_prompt_tokens"] == 5 * 20 * (1 + 3)
    assert report["engine"]["num_output_tokens"] == 5 * 6 * (1 + 3)
    assert report["engine"].get("num_cached_tokens", 0) == 0
    lines = out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.lstrip().startswith("batch"))
    assert [line.split()[0] for line in lines[header + 1 : header + 3]] == ["1", "3"]
    assert "KV cache:" in out
    assert re.search(r"memory: process .* MiB at most", out)


def test_throughput_of_a_request_file(bench, request_file):
    out, report = bench("throughput", "--requests", request_file, "--repeats", 2)
    check_report(report, "throughput")
    (row,) = report["figures"]
    assert (row["requests"], row["prompt_tokens"], row["output_tokens"]) == (3, 20, 12)
    for name in ("seconds", "requests_per_s", "prompt_tokens_per_s", "output_tokens_per_s"):
        check_spread(row[name], 2)
    assert row["output_tokens_per_s"]["max"] == pytest.approx(12 / row["seconds"]["min"])
    assert row["prompt_tokens_per_s"]["min"] == pytest.approx(20 / row["seconds"]["max"])
    assert report["engine"]["num_output_tokens"] == 3 * 12
    assert report["engine"]["num_prompt_tokens"] == 3 * 20
    assert "output tokens/s" in out


def test_throughput_of_equal_requests_and_of_part_of_a_file(bench, request_file):
    sizes = ("--num-requests", 2, "--prompt-len", 9, "--output-len", 4)
    _, report = bench("throughput", *sizes, "--repeats", 1, "--warmup", 0)
    assert report["figures"][0]["prompt_tokens"] == report["engine"]["num_prompt_tokens"] == 18
    assert report["figures"][0]["output_tokens"] == report["engine"]["num_output_tokens"] == 8
    _, report = bench("throughput", "--requests", request_file, *sizes, "--repeats", 1, "--warmup", 0)
    assert report["figures"][0]["prompt_tokens"] == 19


def test_throughput_of_several_outputs_a_prompt(bench):
    _, report = bench(
        "throughput", "--n", 3, "--num-requests", 2, "--prompt-len", 40, "--output-len", 4, "--repeats", 2
    )
    (row,) = report["figures"]
    assert (row["requests"], row["prompt_tokens"], row["output_tokens"]) == (2, 80, 24)
    assert report["engine"]["num_output_tokens"] == 3 * 24
    assert report["engine"]["mean_sharing"] > 0


@pytest.mark.parametrize(
    ("mode", "asynchronous"), [("recompute", "--async-scheduling"), ("swap", "--no-async-scheduling")]
)
def test_throughput_in_a_cache_that_is_too_small(bench, mode, asynchronous):
    sizes = ("--num-requests", 4, "--prompt-len", 20, "--output-len", 40, "--max-model-len", 100)
    options = (
        "--kv-cache-memory",
        "160Ki",
        "--preemption-mode",
        mode,
        "--swap-space",
        "1M",
        "--enforce-eager",
        asynchronous,
    )
    out, report = bench("throughput", *sizes, *options, "--repeats", 1, "--warmup", 0)
    engine = report["engine"]
    assert engine["num_preemptions"] > 0
    assert engine["num_swaps"] == (engine["num_preemptions"] if mode == "swap" else 0)
    assert ("by swapping" in out) is (mode == "swap")


def test_serve(bench, request_file):
    out, report = bench("serve", "--requests", request_file, "--request-rate", 50)
    check_report(report, "serve")
    (row,) = report["figures"]
    assert (row["requests"], row["request_rate"], row["output_tokens"]) == (3, 50, 12)
    check_distribution(row["ttft_ms"], 3)
    check_distribution(row["itl_ms"], 12 - 3)
    check_distribution(row["normalized_ms"], 3)
    assert row["output_tokens_per_s"] == pytest.approx(12 / row["seconds"])
    assert row["normalized_ms"]["max"] <= row["seconds"] * 1e3
    assert "normalised ms" in out


def test_random_weights_from_a_config_alone(cupaged, tiny_model, tmp_path):
    config = tmp_path / "config.json"
    config.write_bytes((tiny_model / "config.json").read_bytes())
    sizes = ("--num-requests", 2, "--prompt-len", 4, "--output-len", 2, "--repeats", 1)
    run = cupaged("bench", "throughput", "-m", config, "--load-format", "dummy", *TINY, *sizes)
    assert run.code == 0, run.err
    assert config.name in run.out


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_startup(bench, load_format):
    out, report = bench("startup", "--repeats", 2, "--load-format", load_format)
    assert report["environment"]["device"].startswith("the CPU")
    assert report["memory"]["peak_rss_bytes"] > 0
    (row,) = report["figures"]
    assert row["kernel_cache"] == "none"
    names = ["started_s", "imported_s", "loaded_s", "first_token_s"]
    for name in names:
        check_spread(row[name], 2)
    medians = [row[name]["median"] for name in names]
    assert medians == sorted(medians)
    assert "first token s" in out


def test_a_start_that_fails_says_why(cupaged, tiny_model):
    run = cupaged("bench", "startup", "-m", tiny_model, "--device", "cpu", "--kv-cache-memory", "1k", "--repeats", 1)
    assert run.code == 1
    assert "kv_cache_memory_bytes" in run.err
    assert "Traceback" not in run.err


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["latency", "--batch", "1,0"], 2, "write whole numbers from 1"),
        (["latency", "--batch", "one"], 2, "write whole numbers from 1"),
        (["latency", "--batch", "300"], 2, "300 is more than the 256 sequences that run at once"),
        (["latency", "--output-len", "1"], 2, "--output-len"),
        (["latency", "--prompt-len", "510"], 2, "request 0: 510 + 128 tokens are more than the 512"),
        (["latency", "--repeats", "0"], 2, "--repeats"),
        (["latency", "--json", "/nowhere/at/all.json"], 2, "--json: there is no directory /nowhere/at"),
        (["throughput", "--requests", "/nowhere.json"], 2, "/nowhere.json: can't be read"),
        (["serve"], 2, "--request-rate"),
        (["serve", "--request-rate", "0"], 2, "request_rate must be a number above 0"),
        (["serve", "--request-rate", "inf"], 2, "request_rate must be a number above 0"),
        (["kernels"], 1, "bench kernels times the CUDA kernels, but this would run on the CPU"),
        (["kernels", "--only", "matmul"], 2, "no kernels are called matmul; there are linear,"),
        (["kernels", "--decode", "8"], 2, "write sequences x tokens in each"),
        (["kernels", "--prefill", "8x0"], 2, "write sequences x tokens in each"),
        (["kernels", "--block-size", "12"], 2, "block_size must be one of"),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code(cupaged, tiny_model, args, code, says):
    run = cupaged("bench", args[0], "-m", tiny_model, "--device", "cpu", *args[1:])
    assert run.code == code
    assert says in run.err
    assert "Traceback" not in run.err
    assert len([line for line in run.err.splitlines() if "rror" in line]) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{oops", "not valid JSON"),
        ("[]", 'must be {"seed": ..., "requests": [...]}'),
        ('{"requests": []}', "at least one request"),
        ('{"requests": [{"prompt_len": 1, "output_len": 2}, {"prompt_len": 1}]}', "requests[1]: prompt_len and output"),
        ('{"requests": [{"prompt_len": 0, "output_len": 2}]}', "must be integers >= 1"),
        ('{"requests": [7]}', "requests[0]"),
        ('{"seed": -1, "requests": [{"prompt_len": 1, "output_len": 2}]}', "seed must be an integer >= 0; got -1"),
    ],
)
def test_bad_request_files(cupaged, tiny_model, tmp_path, content, says):
    file = tmp_path / "requests.json"
    file.write_text(content)
    run = cupaged("bench", "throughput", "-m", tiny_model, *TINY, "--requests", file)
    assert run.code == 2
    assert says in run.err
    assert str(file) in run.err
    assert "Traceback" not in run.err
