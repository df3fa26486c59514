"""How a model is sharded: shards kept in the host's memory, and what is gathered at once (see also test_run.py)."""

import os
from pathlib import Path

import families
import models
import pytest
import ranks
import runs
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from msif_ray.cluster.sharding import RankGroup, _configuration, gathered, join, load_sharded
from msif_ray.influence.batch import Batch, WindowKey
from msif_ray.influence.capture import Capture
from msif_ray.influence.modules import find_linear_maps

pytestmark = pytest.mark.usefixtures("no_shared_cluster")
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Each map's output gradients, and the losses, on one batch."""
    ids = torch.tensor([[5, 9, 13, 21, 8], [7, 30, 11, 4, 6]])
    targets = torch.ones_like(ids, dtype=torch.bool)
    targets[:, 0] = False
    batch = Batch(ids, torch.ones_like(targets), targets, (WindowKey("a", 0), WindowKey("b", 0)))
    maps = find_linear_maps(model, None)
    with Capture(model, maps) as capture:
        for _ in range(2):  # DeepSpeed records the order of the maps in the first pass and follows it in the second
            captured = capture.run(batch)
    return {name: captured.gradients(name) for name in maps} | {"losses": captured.losses}


def offloaded(folder: str) -> dict[str, list[float]]:
    model = load_sharded(folder, torch.float64, CPU, offload=True)
    held = sum(weight.ds_tensor.numel() for weight in model.parameters())
    whole = sum(weight.ds_numel for weight in model.parameters())
    assert held < 0.6 * whole, "the model is too small to be sharded"
    return {name: tensor.flatten().tolist() for name, tensor in gradients(model).items()}


def test_offloaded_ranks_give_the_gradients_of_the_whole_model(tmp_path: Path) -> None:
    runs.save_wide_pair(tmp_path)
    folder = str(tmp_path / "stage0")
    wanted = gradients(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval())
    for found in ranks.run(2, offloaded, folder):
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(torch.tensor(found[name], dtype=torch.float64), tensor.flatten())


@pytest.mark.long
def test_offloaded_ranks_give_the_gradients_of_a_mixture_of_experts(tmp_path: Path) -> None:
    folder = str(tmp_path)
    model = families.build("mixtral", 0, std=0.1, hidden_size=96, head_dim=48, intermediate_size=96)
    models.save(model, models.build_tokenizer(), folder)
    wanted = gradients(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval())
    assert sum(".experts." in name for name in wanted) == 16
    for found in ranks.run(2, offloaded, folder):
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(
                torch.tensor(found[name], dtype=torch.float64), tensor.flatten(), rtol=1e-5, atol=1e-7
            )


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
