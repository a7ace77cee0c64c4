"""The first visit to a GPU, as far as it goes without one: its stages run, fail, hang and run out of time."""

import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from gpu.visit import CUPAGED, MODEL_TESTS, Stage, stages, visit

from cupaged.cli.main import cli

PASS = (sys.executable, "-c", "print('some lines'); print('2 passed, 1 skipped in 3.0s')")
FAIL = (sys.executable, "-c", "print('FAILED tests/x.py::test_y - it broke\\n1 failed in 2s'); raise SystemExit(3)")
HANG = (  # as does what it starts
    sys.executable,
    "-c",
    "import subprocess, sys, time; print('begun', flush=True); "
    "subprocess.run([sys.executable, '-c', 'import pathlib, time; time.sleep(3); pathlib.Path(\"late\").touch()'])",
)


def test_what_becomes_of_one_stage_is_no_matter_to_the_next(tmp_path, capsys):
    todo = [
        Stage("a", PASS, 60),
        Stage("b", FAIL, 60),
        Stage("c", HANG, 1.5),
        Stage("d", ("no-such-tool", "--flag"), 60),
        Stage("e", (sys.executable, "-c", "import os; print('it is', os.environ['SAYS'])"), 60, {"SAYS": "so"}),
    ]
    assert not visit(todo, tmp_path, 60)
    summary = (tmp_path / "summary.txt").read_text()
    assert capsys.readouterr().out == summary
    lines = [line.rsplit(", ", 1)[0] if line[1] == ":" else line for line in summary.splitlines()]
    assert lines == [
        "a: ok",
        "    2 passed, 1 skipped in 3.0s",
        "b: FAILED (3)",
        "    FAILED tests/x.py::test_y - it broke",
        "    1 failed in 2s",
        "c: too long",
        "    begun",
        "d: left out: no-such-tool is not installed",
        "e: ok",
        "    it is so",
    ]
    time.sleep(2)
    assert not (tmp_path / "late").exists()


def test_a_visit_ends_in_time(tmp_path):
    todo = [Stage("a", HANG, 60), Stage("b", PASS, 60)]
    start = time.monotonic()
    assert visit(todo, tmp_path, 1.5)
    assert time.monotonic() - start < 10
    assert "b: left out: the time is up" in (tmp_path / "summary.txt").read_text()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_the_commands_are_such_that_exist(tmp_path, arch):
    found = stages(tmp_path, arch)
    assert len({stage.name for stage in found}) == len(found)
    assert any("sm90" in stage.name for stage in found) == (arch == "sm_90a")
    for stage in found:
        command = list(stage.command)
        if command[: len(CUPAGED)] == list(CUPAGED):
            parse(cli, command[len(CUPAGED) :])
        for part in command:
            assert not part.startswith("/") or Path(part).exists() or tmp_path in Path(part).parents


def parse(command: click.Command, args: list[str]) -> None:
    """Raises UsageError for arguments that the command doesn't take."""
    if isinstance(command, click.Group):
        parse(command.commands[args[0]], args[1:])
    else:
        command.make_context(command.name, args)


def test_quick_and_other_model_tests_are_all_of_them(tmp_path):
    """Each test of tests/gpu is in just one of the stages that run in the portable tier."""

    def collected(*command: str) -> list[str]:
        run = subprocess.run([*command, "--collect-only"], capture_output=True, text=True, cwd=tmp_path, check=False)
        return [line for line in run.stdout.splitlines() if "::" in line]

    by_name = {stage.name: stage for stage in stages(tmp_path, "sm_80")}
    quick, others = (collected(*by_name[name].command) for name in ("quick-models", "models"))
    assert len(quick) >= 10
    assert len(others) >= 5
    assert sorted(quick + others) == sorted(collected(*MODEL_TESTS))


def test_without_a_gpu(tmp_path):
    run = subprocess.run(
        [sys.executable, Path(__file__).parent / "gpu" / "visit.py", tmp_path / "out"],
        capture_output=True, text=True, check=False, env={"CUDA_VISIBLE_DEVICES": "-1"},
    )  # fmt: skip
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
