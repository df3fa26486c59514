"""What jobs say of mistakes, before they do anything."""

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from msif_ray.benchmark import peers, through_ray
from msif_ray.errors import UserError

JOBS = Path(__file__).parents[1] / "jobs"
NO_GPU = "--device: PyTorch has no CUDA GPU here; name cpu"


def told(job: str, *arguments: str) -> Any:
    """What comes of a job that is called so: a UserError is told in one line by its `__main__`."""
    app = typer.Typer()
    app.command()(runpy.run_path(str(JOBS / job))["main"])
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["--device", "cuda"], NO_GPU, marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")),
        (["--device", "foo"], "--device: steps are timed on cpu and on cuda, not on 'foo'"),
        (["--device", "cuda:1"], "--device: steps are timed on cpu and on cuda, not on 'cuda:1'; CUDA_VISIBLE_DEVICES"),
        (["--json", f"{__file__}/found.json"], f"--json: {__file__}/found.json cannot be written"),
        (["--keep", "inf"], "--keep: inf is no number of GiB"),
        (["--size", "huge"], "--size: there is no 'huge', only small, wide, pythia-160m, pythia-1b, pythia-2.8b"),
    ],
)
def test_what_the_benchmark_cannot_do_is_told_first(options: list[str], message: str) -> None:
    error = told("benchmark.py", *options).exception
    assert isinstance(error, UserError) and str(error).startswith(message)


@pytest.mark.parametrize(
    ("missing", "options", "message"),
    [
        ("kronfluence", ["--against", "kronfluence"], "--against: kronfluence is not installed"),
        ("ray", ["--ray"], "--ray: Ray is not installed"),
        (
            None,
            ["--against", "kronfluence", "--ragged"],
            "--against: kronfluence is given documents of one length; leave",
        ),
    ],
)
def test_what_the_benchmark_cannot_compare_is_told_before_anything_is_timed(
    missing: str | None, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (peers, through_ray):
        monkeypatch.setattr(module, "find_spec", lambda name: None if name == missing else object())
    error = told("benchmark.py", *options).exception
    assert isinstance(error, UserError) and str(error).startswith(message)


@pytest.mark.parametrize("variant", ["4:nope", "0:int8", "int8", "4"])
def test_an_index_is_of_a_rank_and_a_type(variant: str) -> None:
    error = told("index_report.py", "none.yaml", "--variants", variant).exception
    assert isinstance(error, UserError)
    assert str(error).startswith(f"--variants: {variant!r} is not a rank and a type, such as 8:int8; types: int8, ")


@pytest.mark.parametrize(
    ("job", "option", "value"),
    [
        ("benchmark.py", "--queries", "0"),
        ("benchmark.py", "--rank", "0"),
        ("benchmark.py", "--eigh-maps", "-1"),
        ("benchmark.py", "--keep", "-1"),
        ("index_report.py", "--documents", "0"),
        ("index_report.py", "--join", "0"),
        ("rank_table.py", "--memory", "-1"),
        ("rank_table.py", "--queries", "0"),
    ],
)
def test_numbers_have_bounds(job: str, option: str, value: str) -> None:
    found = told(job, *(["none.yaml"] if job == "index_report.py" else []), option, value)
    assert found.exit_code == 2 and option in found.output


def test_memory_for_directions_is_a_number() -> None:
    error = told("rank_table.py", "--memory", "inf").exception
    assert isinstance(error, UserError) and str(error) == "--memory: inf is no number of GiB"


def test_no_memory_for_directions_is_not_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    main = runpy.run_path(str(JOBS / "rank_table.py"))["main"]
    given: list[Any] = []
    monkeypatch.setitem(main.__globals__, "rank_table", lambda *arguments: given.append(arguments))
    main("folder", 4, 5, 0.0)
    assert given == [("folder", 4, 5, 1)]


INTERRUPTED = """
import runpy, sys
class Interrupted:
    def find_spec(self, name, *rest):
        if name == "pydantic":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
sys.argv = ["attribute.py", "run.yaml"]
runpy.run_path("jobs/attribute.py", run_name="__main__")
"""


def test_ctrl_c_while_libraries_are_imported_ends_without_a_traceback() -> None:
    command = [sys.executable, "-c", INTERRUPTED]
    done = subprocess.run(command, cwd=JOBS.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and "Traceback" not in done.stderr
