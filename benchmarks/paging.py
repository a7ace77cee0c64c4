"""What paging is for, measured on the whole engine: outputs that share a prompt, beams, too little memory for all, and
a long prompt beside running streams.

    python benchmarks/paging.py -m benchmarks/configs/llama-3.1-8b.json --load-format dummy --json FILE [--only ...]

Prompts are random token ids, each run's others; EOS is ignored; sampling is at temperature 1.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
from engines import Report, add_model_arguments, engine_with

from cupaged import LLM
from cupaged.benchmark.figures import distribution
from cupaged.benchmark.workload import FIRST_ID
from cupaged.config import PREEMPTION_MODES
from cupaged.engine.engine import Engine
from cupaged.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

PROMPT_LEN, OUTPUT_LEN = 512, 128
WIDTH = 4
MAX_MODEL_LEN = 32768
RNG = np.random.default_rng(0)


def prompt_of(engine: Engine, length: int) -> list[int]:
    return RNG.integers(FIRST_ID, engine.model.vocab_size, length).tolist()


def sampling(n: int = 1, max_tokens: int = OUTPUT_LEN, kind=RequestOutputKind.FINAL_ONLY) -> SamplingParams:
    return SamplingParams(n=n, max_tokens=max_tokens, ignore_eos=True, detokenize=False, output_kind=kind)


def seconds_for(engine: Engine, requests: list[tuple[list[int], SamplingParams | BeamSearchParams]]) -> float:
    """All at once, to the last token; each must give all that it was asked for."""
    num_left = 0
    start = time.perf_counter()
    for i, (prompt, params) in enumerate(requests):
        engine.add_request(str(i), prompt, params)
        num_left += params.max_tokens * getattr(params, "n", WIDTH)
    while engine.has_unfinished_requests():
        for output in engine.step():
            num_left -= sum(len(completion.token_ids) for completion in output.outputs)
    assert num_left == 0
    return time.perf_counter() - start


def median_seconds(engine: Engine, repeats: int, params, *, num_requests: int, same_prompt: bool = False) -> float:
    """Of requests that come together and want the same, for prompts that are each run's own."""

    def run() -> float:
        prompts = [prompt_of(engine, PROMPT_LEN) for _ in range(1 if same_prompt else num_requests)]
        return seconds_for(engine, [(prompts[i % len(prompts)], params) for i in range(num_requests)])

    run()  # compiles, captures, takes memory
    return statistics.median(run() for _ in range(repeats))


def samples(llm: LLM, repeats: int) -> dict:
    """n = 32 outputs of one prompt beside 32 requests for one output each, of the same prompt."""
    results = {}
    for cached in (False, True):
        for name, num_requests, n in (("n = 32", 1, 32), ("32 requests", 32, 1)):
            with engine_with(llm, enable_prefix_caching=cached) as engine:
                seconds = median_seconds(engine, repeats, sampling(n), num_requests=num_requests, same_prompt=True)
                results[f"{name}, prefix cache {'on' if cached else 'off'}"] = {
                    "tokens_per_s": 32 * OUTPUT_LEN / seconds,
                    "peak_blocks": engine.stats().peak_used_blocks,
                }
    return results


def beams(llm: LLM, repeats: int) -> dict:
    """Beam search beside sampling as many outputs of as many prompts."""
    results = {}
    with engine_with(llm) as engine:
        for num_prompts in (1, 8):
            search = BeamSearchParams(WIDTH, OUTPUT_LEN, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY)
            rates = {}
            for name, params in (("sampling", sampling(WIDTH)), ("beams", search)):
                copies = engine.stats().num_copies
                seconds = median_seconds(engine, repeats, params, num_requests=num_prompts)
                rates[name] = WIDTH * OUTPUT_LEN * num_prompts / seconds
                rates[f"{name}: copies a step"] = (engine.stats().num_copies - copies) / (1 + repeats) / OUTPUT_LEN
            results[f"{num_prompts} prompts"] = {**rates, "share": rates["beams"] / rates["sampling"]}
    return results


def short_of_memory(llm: LLM, repeats: int, modes: Sequence[str] = PREEMPTION_MODES, num_requests: int = 512) -> dict:
    """Throughput when the cache holds 40 % of what those that run fill when memory is no limit (max_num_seqs of them,
    of twice as many that wait from the start), in each mode of preemption. Prompts of 256 to 768 tokens, outputs of 128
    to 384."""
    sizes = [(RNG.integers(256, 769).item(), RNG.integers(128, 385).item()) for _ in range(num_requests)]
    num_tokens = sum(output_len for _, output_len in sizes)

    def run(**options) -> dict:
        with engine_with(llm, max_model_len=2048, **options) as engine:

            def once(count: int) -> float:
                requests = [(prompt_of(engine, length), sampling(max_tokens=end)) for length, end in sizes[:count]]
                return seconds_for(engine, requests)

            once(num_requests // 4)
            before = engine.stats()
            seconds = statistics.median(once(num_requests) for _ in range(repeats))
            stats = engine.stats()
            return {
                "tokens_per_s": num_tokens / seconds,
                "peak_blocks": stats.peak_used_blocks,
                "preemptions_per_run": (stats.num_preemptions - before.num_preemptions) / repeats,
                "swaps_per_run": (stats.num_swaps - before.num_swaps) / repeats,
            }

    results = {"all fit": run()}
    demand = results["all fit"]["peak_blocks"] * llm.engine.arena.layout.bytes_per_block
    for mode in modes:
        row = run(kv_cache_memory_bytes=int(0.4 * demand), preemption_mode=mode, swap_space_bytes=8 << 30)
        results[f"40 %, {mode}"] = {**row, "share": row["tokens_per_s"] / results["all fit"]["tokens_per_s"]}
    return results


def long_prompt(llm: LLM, repeats: int, thresholds: list[int], num_streams: int = 64, length: int = 30_000) -> dict:
    """Milliseconds between two tokens of running streams: by themselves, and from the arrival of a long prompt to its
    first token; with several long_prefill_token_thresholds."""
    results = {}
    with engine_with(llm) as engine:
        for i in range(num_streams):
            params = sampling(max_tokens=20_000, kind=RequestOutputKind.DELTA)
            engine.add_request(str(i), prompt_of(engine, PROMPT_LEN), params)

        def steps(until: Callable[[int, list], bool]) -> list[float]:
            times, last = [], time.perf_counter()
            while True:
                outputs = engine.step()
                now = time.perf_counter()
                assert len(outputs) >= num_streams  # a token each
                times.append((now - last) * 1e3)
                last = now
                if until(len(times), outputs):
                    return times

        while len(engine.step()) < num_streams:
            pass

        def steps_beside() -> list[float]:
            engine.add_request("long", prompt_of(engine, length), sampling(max_tokens=2, kind=RequestOutputKind.DELTA))
            times = steps(lambda _, outputs: any(output.request_id == "long" for output in outputs))
            engine.abort("long")
            steps(lambda count, _: count == 10)
            return times

        for threshold in thresholds:
            engine.scheduler.max_chunk = threshold
            steps_beside()  # compiles, captures, takes memory
            alone = steps(lambda count, _: count == 200)
            beside = steps_beside()
            results[str(threshold)] = {
                "alone_ms": distribution(alone),
                "beside_ms": distribution(beside),
                "p99_ratio": np.percentile(beside, 99) / np.percentile(alone, 99),
                "seconds_to_first_token": sum(beside) / 1e3,
            }
    return results


EXPERIMENTS = {"samples": samples, "beams": beams, "short_of_memory": short_of_memory, "long_prompt": long_prompt}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num-requests", type=int, default=512, help="of short_of_memory")
    parser.add_argument("--modes", nargs="+", choices=PREEMPTION_MODES, default=PREEMPTION_MODES, help="of the same")
    parser.add_argument("--thresholds", type=int, nargs="+", default=[64, 128, 256, 2048])
    arguments = parser.parse_args()
    with LLM(
        arguments.model, load_format=arguments.load_format, device=arguments.device, max_model_len=MAX_MODEL_LEN
    ) as llm:
        report = Report(llm, arguments)
        for name in arguments.only:
            options = {
                "long_prompt": {"thresholds": arguments.thresholds},
                "short_of_memory": {"modes": arguments.modes, "num_requests": arguments.num_requests},
            }.get(name, {})
            report.add(name, EXPERIMENTS[name](llm, arguments.repeats, **options))


if __name__ == "__main__":
    main()
