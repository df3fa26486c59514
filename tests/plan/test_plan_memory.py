"""The plan's memory against that of a real run's processes. It takes minutes: the model is not tiny."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import yaml
from cluster import runs
from plan.watching import run_watched

pytestmark = pytest.mark.usefixtures("no_shared_cluster")
TOLERANCE = 0.2
MEBI = 2**20


def describe(folder: Path, monkeypatch: pytest.MonkeyPatch, **cluster: Any) -> Path:
    """A run over a model of 12.7 M parameters: 232 MiB of factors per stage, 385 MiB of directions."""
    models.save_pair(
        folder,
        "gpt_neox",
        seed=5,
        tokenizer=models.build_tokenizer(pad=True),
        dtype=torch.float32,
        hidden=512,
        intermediate=2048,
        layers=4,
        heads=8,
    )
    monkeypatch.setattr(runs, "BASE", models.random_documents(1, 96, (20, 60), prefix="base"))
    monkeypatch.setattr(runs, "TUNING", models.random_documents(2, 64, (8, 25), completions=True, prefix="tune"))
    monkeypatch.setattr(runs, "QUERIES", models.random_documents(3, 8, (3, 6), completions=True, prefix="query"))
    description = runs.two_stages(folder, "run", dtype="float32", tokens_per_batch=1024, **cluster)
    description["stages"][0]["fit"] = {"max_tokens": 64}
    description["stages"][1]["fit"] = {"max_tokens": 48}
    description["cluster"]["documents_per_block"] = 32
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(description))
    return path


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("factor_memory", [None, "80MiB"])
def test_ranks_and_driver_take_what_the_plan_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor_memory: str | None
) -> None:
    path = describe(tmp_path, monkeypatch, **({"factor_memory": factor_memory} if factor_memory else {}))
    # In a process of its own: the driver's memory is that of the process that plans.
    command = [sys.executable, "-c", "from msif_ray.cli import main; main()", "plan", str(path), "--json"]
    plan = json.loads(subprocess.run(command, check=True, timeout=600, stdout=subprocess.PIPE).stdout)
    found = run_watched(path, timeout=1500)

    def most(*endings: str) -> float:
        return max(step["memory"] for step in plan["steps"] if step["name"].endswith(endings))

    planned = {
        "fit": most("covariance", "correction", "gradients"),
        "score": most("covariance", "correction", "gradients", "scores", "top documents"),
        "hand": plan["hand_memory"],
        "driver": plan["driver_memory"],
        "eigendecomposition": most("eigendecomposition"),
        "carry": most("carried back"),
    }
    print()
    for kind, says in planned.items():
        print(f"{kind}: planned {says / MEBI:.0f} MiB, found {found.get(kind, 0) / MEBI:.0f} MiB")
    for kind in ("fit", "score", "hand", "driver"):
        assert planned[kind] == pytest.approx(found[kind], rel=TOLERANCE), kind
