"""All that a GPU can tell of this checkout, what matters most first, within some minutes.

    python tests/gpu/visit.py OUT [--minutes 10] [--only STAGE ...]

Each stage is a process of its own with a time limit; what becomes of one doesn't keep the next from running. OUT gets
a log of each, the benchmarks' figures as JSON, the compiled kernels, and summary.txt: a line for each stage, with the
tests that failed or what was measured, written anew after each. Ends with 1 if a stage failed, with 2 without a GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "benchmarks" / "configs"
CUPAGED = (sys.executable, "-m", "cupaged.cli.main")
PYTEST = (sys.executable, "-m", "pytest", "-q", "--tb=short")
# In processes of their own: what an access out of bounds leaves of a process fails all of its later tests.
KERNEL_TESTS = (*PYTEST, str(ROOT / "tests" / "kernels"), "-m", "gpu and not sm90")
SM90_TESTS = (*PYTEST, str(ROOT / "tests" / "kernels"), "-m", "gpu and sm90")
MODEL_TESTS = (*PYTEST, str(ROOT / "tests" / "gpu"), "-m", "gpu", "-rP")
QUICK = "tiny or captured or default_stream or equality"  # tests of tests/gpu that need no real model
NO_GIGABYTES = "not 2_to_31 and not 2_31"
SANITIZER = "compute-sanitizer"
TELLING = re.compile(r"^(FAILED|ERROR) |^(=+ )?\d+ (passed|failed|error|skipped).* in |ERROR SUMMARY")  # lines of a log
NUM_LINES = 12  # of a log that the summary shows at most

# Run in a process that ends: this one is to hold nothing on the GPU.
PROBE = """
import sys
from cupaged.backends.cuda import probe
from cupaged.kernels.device import device_info
found = probe()
print(device_info().arch) if found.usable else sys.exit(found.text)
"""


@dataclass(frozen=True)
class Stage:
    """seconds: the most that it may take. environment: variables that differ."""

    name: str
    command: Sequence[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)


def stages(out: Path, arch: str) -> list[Stage]:
    """arch: the GPU's, in NVRTC's spelling. A Hopper gets some stages twice: with the portable kernels and its own."""
    portable = {"CUPAGED_KERNELS": str(out / "kernels"), "CUPAGED_TIER": "portable"}
    tiers = [portable] + ([{**portable, "CUPAGED_TIER": "sm90"}] if arch == "sm_90a" else [])

    def with_figures(name: str, command: Sequence[str], seconds: float) -> list[Stage]:
        names = [name, f"{name}-sm90"]
        return [
            Stage(name, (*command, "--json", str(out / f"{name}.json")), seconds, tier)
            for name, tier in zip(names, tiers, strict=False)
        ]

    def latency(name: str, seconds: float, *options: str) -> list[Stage]:
        return with_figures(name, (*CUPAGED, "bench", "latency", "--device", "cuda", *options), seconds)

    def dummy(config: str) -> tuple[str, ...]:
        return "-m", str(CONFIGS / f"{config}.json"), "--load-format", "dummy", "--max-model-len", "4096"

    def sanitized(tool: str, seconds: float) -> Stage:
        command = (SANITIZER, "--tool", tool, "--error-exitcode", "1", *KERNEL_TESTS, "-k", "formula")
        return Stage(tool, command, seconds, portable)

    generate = (*CUPAGED, "generate", "The capital of France is", "--device", "cuda", "--temperature", "0", "--stats")
    bench_kernels = (*CUPAGED, "bench", "kernels", "--device", "cuda", "-m", str(CONFIGS / "llama-3.1-8b.json"))
    compare = (sys.executable, str(ROOT / "benchmarks" / "compare_kernels.py"))
    return [
        Stage("pull", (*CUPAGED, "pull"), 120),
        Stage("info", (*CUPAGED, "info"), 30),
        Stage("compile", (*CUPAGED, "compile", "--arch", arch, "--out", str(out / "kernels")), 150),
        Stage("generate", generate, 60, portable),
        Stage("quick-models", (*MODEL_TESTS, "-k", QUICK), 150, portable),
        Stage("kernels", (*KERNEL_TESTS, "-k", NO_GIGABYTES), 150, portable),
        *(
            stage
            for tier in tiers[1:]
            for stage in (
                Stage("kernels-sm90", SM90_TESTS, 60, tier),
                Stage("quick-models-sm90", (*MODEL_TESTS, "-k", "tiny"), 60, tier),
            )
        ),
        *latency("latency-135m", 40, "--batch", "1,8,64,256"),
        latency("latency-135m-eager", 20, "--batch", "1,64", "--enforce-eager", "--repeats", "2")[0],
        *latency("latency-1b", 60, "--batch", "1,64,256", *dummy("llama-3.2-1b")),
        *latency("latency-8b", 90, "--batch", "1,64", *dummy("llama-3.1-8b")),
        *with_figures("bench-kernels", bench_kernels, 60),
        *with_figures("compare", compare, 60),
        sanitized("memcheck", 60),
        sanitized("racecheck", 60),
        sanitized("synccheck", 30),
        Stage("models", (*MODEL_TESTS, "-k", f"not ({QUICK})"), 300, portable),
    ]


def visit(todo: Iterable[Stage], out: Path, seconds: float) -> bool:
    """Run the stages until the time is up; returns whether all that ran went well."""
    end, lines, all_well = time.monotonic() + seconds, [], True
    for stage in todo:
        limit = min(stage.seconds, end - time.monotonic())
        log = out / f"{stage.name}.log"
        if limit < 1:
            outcome, told = "left out: the time is up", []
        elif shutil.which(stage.command[0]) is None:
            outcome, told = f"left out: {stage.command[0]} is not installed", []
        else:
            start = time.monotonic()
            status = _run(stage, log, limit)
            outcome = {0: "ok", None: "too long"}.get(status, f"FAILED ({status})")
            outcome += f", {time.monotonic() - start:.0f} s"
            told, all_well = _tell(log), all_well and status in (0, None)
        lines += [f"{stage.name}: {outcome}", *(f"    {line}" for line in told)]
        print("\n".join(lines[-1 - len(told) :]), flush=True)
        (out / "summary.txt").write_text("\n".join(lines) + "\n")
    return all_well


def _run(stage: Stage, log: Path, seconds: float) -> int | None:
    """The command's exit status; None when it took too long. It ends with all that it has started."""
    with log.open("w") as file:
        process = subprocess.Popen(
            stage.command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=log.parent,  # in the source tree, Python would find its folders instead of what is installed
            env={**os.environ, **stage.environment},
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _tell(log: Path) -> list[str]:
    """What of a log belongs into the summary: failed tests and the counts, or else its end."""
    lines = [line.rstrip()[:200] for line in log.read_text(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if TELLING.search(line)]
    if len(telling) > NUM_LINES:
        telling = [*telling[: NUM_LINES - 1], "...", telling[-1]]
    return telling or lines[-NUM_LINES:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="and no others; stages are listed in summary.txt")
    args = parser.parse_args()

    probe = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    if probe.returncode:
        print(probe.stderr.strip(), file=sys.stderr)
        return 2
    out = args.out.resolve()
    (out / "kernels").mkdir(parents=True, exist_ok=True)  # empty if they can't be compiled ahead
    todo = stages(out, probe.stdout.strip())
    if unknown := set(args.only or ()) - {stage.name for stage in todo}:
        parser.error(f"--only: there are no stages {', '.join(unknown)}; there are {', '.join(s.name for s in todo)}")
    return 0 if visit([s for s in todo if s.name in (args.only or s.name)], out, 60 * args.minutes) else 1


if __name__ == "__main__":
    sys.exit(main())
