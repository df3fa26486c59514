"""Seconds and bytes of a step, on a CPU or a GPU."""

import gc
import resource
import statistics
from collections.abc import Callable, Mapping
from time import perf_counter

import torch


def seconds(step: Callable[[], object], device: str) -> float:
    """One call, by the GPU's own clock where there is one."""
    if torch.device(device).type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1000
    began = perf_counter()
    step()
    return perf_counter() - began


def interleaved(steps: Mapping[str, Callable[[], object]], device: str, repeats: int) -> dict[str, float]:
    """Each step's median over `repeats`, after one call that is not counted. The steps take turns, so that a machine
    whose speed drifts slows them all alike."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            gc.collect()
            found = seconds(step, device)
            if turn:
                taken[name].append(found)
    return {name: statistics.median(each) for name, each in taken.items()}


def peak_mebibytes(device: str) -> float:
    """The most memory that this process had so far: resident, or allocated on its GPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
