"""The calibration: a stage's model, loaded as a rank loads it, does each of its jobs on a few real batches.

It happens in a process of its own, so that its peak of memory is its own and ends with it.
"""

import multiprocessing
import os
import platform
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from time import perf_counter
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from msif_ray import heap
from msif_ray.cluster.rank import ModelSetup, Rank
from msif_ray.errors import UserError
from msif_ray.fetch import local_model
from msif_ray.influence.ekfac import eigenbasis
from msif_ray.influence.groups import FREE_SHARE, accumulating_bytes, module_groups
from msif_ray.plan import counts
from msif_ray.plan.bench import Bench, Measured, Trial
from msif_ray.plan.memory import Gauge

# Sizes for the rates of the tasks that follow a pass, each on one core: large enough for LAPACK's blocks.
EIGEN_SIZE, SVD_SIZE, PRODUCT_SIZE = 768, 384, 1024


@dataclass(frozen=True)
class Calibration:
    """A stage's model on this machine. Bytes: a rank's process before it loads a model, after, at most while it
    loads, and still free after. FLOP per second of tasks on one core."""

    device: str
    empty: int
    loaded: int
    loading: int
    free: int
    jobs: dict[str, Measured]
    eigen_rate: float
    svd_rate: float
    product_rate: float


@dataclass(frozen=True)
class Request:
    trials: tuple[Trial, ...]
    shapes: dict[str, tuple[int, int]]
    factor_memory: int | None
    sharded: bool


def calibrate(request: Request) -> Calibration:
    """Calibrates in a fresh process.

    Raises UserError with the model's own complaint, MemoryError when the process is killed or the device has no
    room (the model does not fit here), and RuntimeError when the process ends without an answer otherwise.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(request, sender))
    with _started(process, alone=not request.trials[0].setup.cuda and not request.sharded):
        sender.close()
        try:
            result = receiver.recv()
        except EOFError:
            process.join()
            if process.exitcode == -signal.SIGKILL:  # as the system does to a process that takes too much
                raise MemoryError("the process that loaded the model was killed") from None
            raise RuntimeError(f"the calibration ended with status {process.exitcode}; what it said is above") from None
        process.join()
    if isinstance(result, Exception):
        raise result
    return result


@contextmanager
def _started(process: BaseProcess, alone: bool) -> Iterator[None]:
    """Starts a process, with what a replica of one rank is started with where it is `alone`, and ends it.

    It does not see Ctrl-C, which a terminal sends to all processes: this one is interrupted, and ends it.
    """
    resource_tracker.ensure_running()  # here: it lets signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        try:
            with heap.environment() if alone else nullcontext():
                process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield
    finally:
        if process.pid is not None:
            process.kill()
            process.join()


def _answer(request: Request, sender: Any) -> None:
    os.dup2(2, 1)  # what libraries print is no part of the plan, which may be read by a machine
    transformers_logging.disable_progress_bar()
    try:
        sender.send(measure(request))
    except UserError as error:
        sender.send(error)
    except (MemoryError, torch.OutOfMemoryError) as error:
        sender.send(MemoryError(str(error)))
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        sender.send(MemoryError(str(error)))


def measure(request: Request) -> Calibration:
    """Loads the model of the trials, which share it, and runs each of them. In this process."""
    import ray.data  # noqa: F401  # as processes of tasks per map have it

    if request.sharded:
        import deepspeed  # noqa: F401
    setup = request.trials[0].setup
    device = torch.device("cuda" if setup.cuda else "cpu")
    gauge = Gauge(device)
    empty = gauge.now()
    gauge.reset()
    rank = Rank(setup)
    loading = gauge.peak()
    gauge.reset()
    loaded, free = gauge.now(), rank.free_memory()
    size = counts.ModelSize.of(local_model(setup.model), setup.classifies)
    budget = request.factor_memory or int(FREE_SHARE * free)
    group = module_groups(request.shapes, budget, accumulating_bytes(setup.dtype))[0]
    shapes = {name: request.shapes[name] for name in group}
    jobs = {}
    for trial in request.trials:
        measured_shapes = shapes if trial.kind in ("covariance", "correction") else request.shapes
        allowed = trial.memory or int(FREE_SHARE * free)
        jobs[trial.name] = Bench(rank, trial, measured_shapes, size, gauge, loaded, allowed, budget).run()
    return Calibration(_device_name(setup), empty, loaded, loading, free, jobs, *_task_rates())


def _device_name(setup: ModelSetup) -> str:
    if setup.cuda:
        return torch.cuda.get_device_name()
    threads = f"{setup.threads} thread" + ("s" if setup.threads > 1 else "")
    return f"CPU {platform.machine()}, {threads}"


def _task_rates() -> tuple[float, float, float]:
    """FLOP per second of one core: eigenvectors in float64, singular vectors and products in float32."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        square = torch.randn(EIGEN_SIZE, EIGEN_SIZE, dtype=torch.float64)
        eigen = _seconds(lambda: eigenbasis(square))
        wide = torch.randn(SVD_SIZE, SVD_SIZE)
        svd = _seconds(lambda: torch.linalg.svd(wide, full_matrices=False))
        left = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE)
        product = _seconds(lambda: left @ left)
    finally:
        torch.set_num_threads(threads)
    return 9.0 * EIGEN_SIZE**3 / eigen, 26.0 * SVD_SIZE**3 / svd, 2.0 * PRODUCT_SIZE**3 / product


def _seconds(work: Any) -> float:
    work()
    began = perf_counter()
    work()
    return perf_counter() - began
