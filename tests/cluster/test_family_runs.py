"""Whole runs of families on a real local Ray cluster: a mixture of experts with a dead one, and heads in blocks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import models
import pytest
import reference
from cluster import runs
from transformers import PreTrainedModel

from msif_ray.config import parse_run
from msif_ray.errors import UserError
from msif_ray.run import run
from msif_ray.store import read_json

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.long, pytest.mark.timeout(900)]
HEADS = {"q.0": (0, 4), "q.1": (4, 8), "k.0": (8, 12), "k.1": (12, 16), "v.0": (16, 20), "v.1": (20, 24)}


def mixture(seed: int) -> PreTrainedModel:
    """Every token goes to one of two experts; the third's router row is the mean of theirs, so never the largest."""
    model = families.build("mixtral", seed, num_local_experts=3, num_experts_per_tok=1)
    return bury(model)


def bury(model: PreTrainedModel) -> PreTrainedModel:
    for layer in model.model.layers:
        router = layer.mlp.gate.weight.data
        router[2] = (router[0] + router[1]) / 2
    return model


def save(folder: Path, first: PreTrainedModel, second: PreTrainedModel) -> None:
    for stage, model in enumerate((first, second)):
        models.save(model, models.build_tokenizer(pad=True), folder / f"stage{stage}")


def largest_error(found: dict[runs.Pair, Any], specs: list[reference.StageSpec], names: list[str]) -> float:
    expected, _ = reference.scores(specs, runs.QUERIES, specs[0].documents, 0, names)
    return runs.largest_error(found, expected)


def test_a_mixture_with_an_expert_that_no_token_reaches(tmp_path: Path) -> None:
    first = mixture(0)
    save(tmp_path, first, bury(models.perturb(first, 1)))
    description = runs.two_stages(tmp_path, "mixture")
    run(parse_run(description))
    specs = [replace(spec, model=families.loosened(spec.model)) for spec in runs.specs(tmp_path)]
    names = [name for name in reference.tracked_names(specs[0].model) if "experts.2." not in name]
    # The model's norms and its router compute in float32 whatever its type.
    assert largest_error(runs.read_scores(description["run_dir"], "pretrain"), specs, names) < 1e-3
    strengths = read_json(Path(description["run_dir"]) / "run.json")["strengths"]["pretrain"]
    dead = [name for name in read_json(tmp_path / "mixture/run.json")["identity"]["maps"] if "experts.2." in name]
    assert len(dead) == 4 and not any(name in used for name in dead for used in strengths.values())


def test_heads_in_blocks_as_the_dense_reference_has_them(tmp_path: Path) -> None:
    first = families.build("gpt2", 0)
    save(tmp_path, first, models.perturb(first, 1))
    description = runs.two_stages(tmp_path, "heads") | {"blocks": "heads"}
    run(parse_run(description))
    rows = {"c_attn": {name: list(range(*span)) for name, span in HEADS.items()}}
    specs = [replace(spec, model=families.cut(spec.model, rows)) for spec in runs.specs(tmp_path)]
    names = reference.tracked_names(specs[0].model)
    found = runs.read_scores(description["run_dir"], "pretrain")
    assert largest_error(found, specs, names) < 2e-7
    record = read_json(Path(description["run_dir"]) / "run.json")["identity"]
    assert record["run"]["blocks"] == "heads" and record["maps"]["transformer.h.1.attn.c_attn.v.1"] == [4, 9]
    with pytest.raises(UserError, match=r"this directory holds another run: blocks was 'heads' and is 'qkv'"):
        run(parse_run(description | {"blocks": "qkv"}))
