"""What a process may still take of its device's memory."""

import os

import torch

from msif_ray.cluster.node_memory import available_memory


def free_memory(device: torch.device, threads: int) -> int:
    """Bytes that a rank may still take: of its GPU, or the share of its threads in what its node has available."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # PyTorch keeps what earlier steps and models have freed, and the device counts it
        return torch.cuda.mem_get_info(device)[0]
    share = threads / (os.cpu_count() or 1)
    return int(available_memory() * min(1.0, share))
