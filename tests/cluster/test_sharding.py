"""How a model is sharded: shards kept in the host's memory, and what is gathered at once (see also test_run.py)."""

import os
from collections.abc import Sequence
from pathlib import Path

import families
import models
import pytest
import ranks
import runs
import spy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed
from transformers import AutoModelForCausalLM

from msif_ray.cluster.sharding import RankGroup, _configuration, gathered, join, load_sharded
from msif_ray.errors import UserError
from msif_ray.influence.batch import Batch, WindowKey
from msif_ray.influence.capture import Capture
from msif_ray.influence.modules import find_linear_maps

pytestmark = pytest.mark.usefixtures("no_shared_cluster")
CPU, GPU = torch.device("cpu"), torch.device("cuda")
LACKED = "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Each map's output gradients, and the losses, on one batch."""
    # DeepSpeed records the order of the maps in the first pass and follows it in the second.
    return passes(model, [(TWO, None)] * 2)[1]


def batch_of(rows: list[list[int]]) -> Batch:
    ids = torch.tensor(rows)
    targets = torch.ones_like(ids, dtype=torch.bool)
    targets[:, 0] = False
    return Batch(ids, torch.ones_like(targets), targets, tuple(WindowKey("a", row) for row in range(len(rows))))


TWO = batch_of([[5, 9, 13, 21, 8], [7, 30, 11, 4, 6]])
# What a rank without work is given.
NONE = batch_of([[0, 0]])
# By rank: as many passes, but not as many tokens, and so not as many experts that get some.
UNEVEN = [[TWO, NONE, TWO, NONE, TWO, NONE], [NONE, TWO, TWO, NONE, NONE, NONE]]
# The first maps of a group that a fit makes, and of another; the second layer's last two experts alone.
SOME_EXPERTS = "model.layers.1.mlp.experts.2.gate_up_proj"
BEGIN_AT = [None, None, None, SOME_EXPERTS, SOME_EXPERTS, None]


def passes(model: torch.nn.Module, wanted: Sequence[tuple[Batch, str | None]]) -> list[dict[str, Tensor]]:
    """Each batch's losses and output gradients of the maps from the one named on, or of all."""
    found, maps = [], find_linear_maps(model, None)
    for batch, first in wanted:
        tracked = list(maps)[0 if first is None else list(maps).index(first) :]
        with Capture(model, {name: maps[name] for name in tracked}) as capture:
            captured = capture.run(batch)
        found.append({name: captured.gradients(name) for name in tracked} | {"losses": captured.losses})
    return found


Numbers = dict[str, list[float]]


def as_lists(tensors: dict[str, Tensor]) -> Numbers:
    return {name: tensor.flatten().tolist() for name, tensor in tensors.items()}


def offloaded(folder: str, mixture: str, lacking: str) -> tuple[Numbers, list[Numbers]]:
    model = load_sharded(folder, torch.float64, CPU, offload=True)
    held = sum(weight.ds_tensor.numel() for weight in model.parameters())
    whole = sum(weight.ds_numel for weight in model.parameters())
    assert held < 0.6 * whole, "the model is too small to be sharded"
    found = as_lists(gradients(model))
    with pytest.raises(UserError, match=rf"^{lacking} has no tensor {LACKED} on this node"):
        load_sharded(lacking, torch.float64, CPU)
    spy.shard_small_weights()
    of_rank = zip(UNEVEN[distributed.get_rank()], BEGIN_AT, strict=True)
    return found, [as_lists(each) for each in passes(load_sharded(mixture, torch.float64, CPU), list(of_rank))]


def test_ranks_give_the_gradients_of_the_whole_model_and_of_a_mixture_of_experts(tmp_path: Path) -> None:
    """Whatever tokens the other rank is given. A checkpoint that lacks a tensor is refused on every rank."""
    runs.save_wide_pair(tmp_path)
    folder, mixture, lacking = (str(tmp_path / name) for name in ("stage0", "mixture", "stage1"))
    tensors = load_file(Path(lacking) / "model.safetensors")
    del tensors[LACKED]
    save_file(tensors, Path(lacking) / "model.safetensors", {"format": "pt"})
    models.save(families.build("olmoe", 0), models.build_tokenizer(), mixture)
    whole, many = (AutoModelForCausalLM.from_pretrained(each, dtype=torch.float64) for each in (folder, mixture))
    wanted = gradients(whole.eval())
    for rank, (found, found_of_mixture) in enumerate(ranks.run(2, offloaded, folder, mixture, lacking)):
        same(found, wanted)
        expected = passes(many.eval(), list(zip(UNEVEN[rank], BEGIN_AT, strict=True)))
        for each, of_pass in zip(found_of_mixture, expected, strict=True):
            same(each, of_pass)


def same(found: Numbers, wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(torch.tensor(found[name], dtype=torch.float64), tensor.flatten())


def test_a_gpu_rank_takes_the_first_gpu_that_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: taken.append(backend))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    join(RankGroup(1, 2, "127.0.0.1", 1), torch.device("cuda"))
    assert taken == [0, "nccl"]  # torch refuses a device without an index


def test_only_a_gpus_shard_is_pinned() -> None:
    settings = [_configuration(device, True)["zero_optimization"]["offload_param"] for device in (CPU, GPU)]
    assert settings == [{"device": "cpu", "pin_memory": False}, {"device": "cpu", "pin_memory": True}]
    assert "offload_param" not in _configuration(GPU, False)["zero_optimization"]


def test_room_for_the_largest_weight_or_for_two_of_a_block() -> None:
    assert gathered([500, *[100] * 8, *[40] * 8, 500]) == (500, 50)
    assert gathered([150, *[100] * 8]) == (200, 50)
    assert gathered([30, 20]) == (60, 15)
