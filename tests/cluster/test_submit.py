"""`ray job submit` of jobs/attribute.py to a head started by `ray start`, stopped half-way and submitted again."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import models
import psutil
import pytest
import yaml
from cluster import runs

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until(holds: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.2)


def end(head: subprocess.Popen[bytes]) -> None:
    """Kills all of a head's processes: asked to end, they take half a minute over it."""
    ended = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
    for process in ended:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    head.wait(60)
    psutil.wait_procs(ended, timeout=60)


@pytest.fixture
def submit(no_shared_cluster: None) -> Iterator[Callable[..., str]]:
    """Runs `ray job ...` against a head of its own; both have RAY_AUTH_MODE=token, as the README says."""
    with ExitStack() as stack:
        # Ray's sockets need a short path; its token is kept in the home directory.
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="msif-", ignore_cleanup_errors=True))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"RAY_AUTH_MODE": "token", "HOME": folder, "RAY_USAGE_STATS_ENABLED": "0"}
        subprocess.run([RAY, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
        port, dashboard = free_port(), free_port()
        head = subprocess.Popen(
            [RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2",
             f"--temp-dir={folder}/ray"],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        stack.callback(end, head)

        def job(*arguments: str) -> str:
            command = [RAY, "job", arguments[0], "--address", f"http://127.0.0.1:{dashboard}", *arguments[1:]]
            found = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
            return found.stdout + found.stderr

        # The dashboard answers before the agent is there that starts jobs.
        until(lambda: "succeeded" in job("submit", "--", "true"), "the head takes jobs", 240)
        yield job


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_job_that_was_stopped_goes_on_when_submitted_again(submit: Callable[..., str], tmp_path: Path) -> None:
    description = runs.two_stages(tmp_path, "run", documents_per_block=2)
    documents = models.random_documents(1, 60, (3, 30), prefix="base")
    description["stages"][0]["documents"]["path"] = runs.write_lines(tmp_path / "more.jsonl", documents)
    description["score"] = [{"stage": "pretrain"}]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(description))
    run_dir = Path(description["run_dir"])
    entrypoint = ["--", sys.executable, "jobs/attribute.py", str(tmp_path / "run.yaml")]

    submit("submit", "--no-wait", "--submission-id", "first", "--working-dir", ".", *entrypoint)
    until((run_dir / "factors" / "pretrain" / "manifest.json").exists, "the first stage is fitted")
    submit("stop", "first")
    assert "stopped" in submit("status", "first").lower()
    assert not (run_dir / "skipped.parquet").exists(), "it was done before it could be stopped"
    written = {path: path.stat().st_mtime_ns for path in (run_dir / "factors" / "pretrain").rglob("*.safetensors")}

    submit("submit", "--no-wait", "--submission-id", "second", "--working-dir", ".", *entrypoint)
    until(lambda: any(end in submit("status", "second").lower() for end in ("succeeded", "failed")), "it ends", 240)
    assert "succeeded" in submit("status", "second").lower(), submit("logs", "second")
    assert {path: path.stat().st_mtime_ns for path in written} == written, "what was fitted was fitted again"
    scores = runs.read_scores(str(run_dir), "pretrain")
    assert len(scores) == len(runs.QUERIES) * len(documents)
    undisturbed = description | {"run_dir": str(tmp_path / "undisturbed")}
    (tmp_path / "undisturbed.yaml").write_text(yaml.safe_dump(undisturbed))
    command = [sys.executable, "jobs/attribute.py", str(tmp_path / "undisturbed.yaml")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=200)
    assert runs.largest_error(scores, runs.read_scores(undisturbed["run_dir"], "pretrain")) < 1e-5


@pytest.mark.long
def test_a_job_on_a_cluster_without_a_gpu_must_say_that_it_wants_none(
    submit: Callable[..., str], tmp_path: Path
) -> None:
    description = runs.two_stages(tmp_path, "run")
    del description["cluster"]["gpus_per_rank"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(description))
    said = submit("submit", "--working-dir", ".", "--", sys.executable, "jobs/attribute.py", str(tmp_path / "run.yaml"))
    assert "msif: cluster.gpus_per_rank: the cluster has no GPU now" in said and "Traceback" not in said
    assert not (tmp_path / "run" / "run.json").exists()
