"""One model sharded over the ranks of a replica by DeepSpeed ZeRO-3, with frozen weights.

Every rank keeps 1/world of each large weight and gathers a map's weight when the map is called. The ranks
see different batches, but the gathers are collective: all ranks must run the same number of forward passes
and of backward passes, or the group waits until its timeout. A rank without work runs a dummy batch.
"""

import os
import warnings
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed, nn

from msif_ray.cluster.gathered import keep_no_gathered_weights
from msif_ray.influence.experts import is_fused
from msif_ray.loading import auto_class, load_pretrained

# In elements. Smaller weights stay whole on every rank: biases and norms, a few thousandths of a model, whose
# gathers would cost a round trip each.
_KEPT_WHOLE = 20_000

# Environment of a CPU rank's process, set before it starts. Without it glibc keeps freed weights for
# itself: each of two ranks of a 1,023 MiB model grew by over 2.2 GiB in three steps, with it by 0.8 GiB.
# Huge pages win back some of the time that handing memory back costs.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


# Times that a CPU rank has what it gathers at once, at most: DeepSpeed's buffer of all shards, gloo's of what it
# receives, and the weight that is made of them. Three Llamas of 300 to 700 MiB on two to four ranks took 2.7 to 3.3
# times of it above their shards.
GLOO_COPIES = 3


@dataclass(frozen=True)
class RankGroup:
    """One rank's place in its replica: the group meets at `address:port`, which rank 0 opens."""

    rank: int
    world: int
    address: str
    port: int


def join(group: RankGroup, device: torch.device, timeout: timedelta = timedelta(minutes=30)) -> None:
    """Enters the replica's process group (gloo on a CPU, nccl on a GPU); returns when all ranks are in.

    Once per process, and before anything else imports DeepSpeed, which reads the environment when imported.
    `timeout` bounds every later wait for another rank, too.
    """
    os.environ |= {
        "RANK": str(group.rank),
        "WORLD_SIZE": str(group.world),
        "MASTER_ADDR": group.address,
        "MASTER_PORT": str(group.port),
        # DeepSpeed takes the device's index from here. Ray shows an actor only its own GPUs.
        "LOCAL_RANK": str(device.index or 0),
        "DS_ACCELERATOR": device.type,
    }
    # DeepSpeed calls torch by a name that torch has begun to replace; nothing that a user could act on.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # which refuses a device without an index
        backend = "nccl"
    distributed.init_process_group(
        backend,
        init_method=f"tcp://{group.address}:{group.port}",
        rank=group.rank,
        world_size=group.world,
        timeout=timeout,
    )


def is_lost_rank(error: BaseException | None) -> bool:
    """Whether an exception is what gloo or NCCL raise on the ranks that are left. gloo has no type of its own."""
    if isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in ("/gloo/", "[gloo]", "Gloo", "NCCL"))


def load_sharded(
    path: str, dtype: torch.dtype, device: torch.device, offload: bool = False, classifies: bool = False
) -> nn.Module:
    """A causal language model, or a classifier, of which each rank holds its shard; call the module as any other.

    Collective: every rank of the group calls it, after `join`. Raises UserError on each of them where the checkpoint
    lacks a tensor. Values agree with the whole model's up to rounding, not always to the last bit: DeepSpeed
    multiplies first and adds the bias after.
    Rank 0 reads the checkpoint through a memory map, whose pages count in its resident size while it loads,
    though the system can drop them. DeepSpeed never lets go of a model: another one wants a new process.
    `offload` keeps a GPU rank's shard in pinned memory of its host; a CPU rank's is there anyway.
    """
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    # Otherwise DeepSpeed compiles its shared-memory collectives (half a minute, and a compiler) where it can.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False)
    auto, config = auto_class(classifies), _configuration(device, offload)
    while_loading = HfDeepSpeedConfig(config)  # from_pretrained shards as long as this object lives
    # This context takes the place of transformers' own, which knows only 16 and 32 bits (whence the `[]`) and
    # replaces torch.Tensor's constructor, so that a module first imported inside it can fail.
    with deepspeed.zero.Init(config_dict_or_path=config, tensor_overrides=[]):
        model = load_pretrained(auto, path, dtype)
    del while_loading
    model.eval().requires_grad_(False)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
        if is_fused(module):  # which of its parts are called, and how often, is for each rank's own tokens to say
            deepspeed.utils.set_z3_leaf_module(module, True)
    engine, *_ = deepspeed.initialize(model=model, config=_configuration(device, offload, model))
    model.__dict__["_engine"] = engine  # its end takes the gathering hooks off the model
    keep_no_gathered_weights(model)
    return model


def _configuration(device: torch.device, offload: bool, model: nn.Module | None = None) -> dict[str, Any]:
    """DeepSpeed's settings, with the limits in elements that the sharded `model` calls for."""
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": _KEPT_WHOLE,
        # A gathered weight goes when its map has run. The default keeps what is used again within 1e9.
        "stage3_max_reuse_distance": 0,
        # F.linear would keep the gathered weight for the backward pass; DeepSpeed's own gathers it again.
        "memory_efficient_linear": True,
    }
    if model is not None:
        weights: list[Any] = list(model.parameters())  # DeepSpeed's attributes are unknown to torch
        live, ahead = gathered([weight.ds_numel for weight in weights])
        zero |= {"stage3_max_live_parameters": live, "stage3_prefetch_bucket_size": ahead}
    if offload:
        # Pinned memory is what a GPU copies from; without one there is nothing to pin it to.
        zero["offload_param"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}


def gathered(sizes: list[int]) -> tuple[int, int]:
    """How many elements may be gathered at once, and how many of them ahead of their use.

    Room for a block's weight in use and the next, or for the largest. The embedding and the head are often several
    times as large as a block's weights; twice their size would prefetch a whole block. DeepSpeed's defaults
    (1e9 and 5e7) gather whole models.
    """
    times = Counter(sizes)
    usual = max((size for size in times if times[size] > 2), default=max(sizes))
    return max(2 * usual, max(sizes)), usual // 2
