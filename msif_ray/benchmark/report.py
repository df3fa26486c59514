"""All steps of one workload timed, as a table and as JSON."""

import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from msif_ray.benchmark.steps import Steps
from msif_ray.benchmark.timing import interleaved, peak_mebibytes, seconds
from msif_ray.benchmark.workload import Workload
from msif_ray.cluster.memory import free_memory
from msif_ray.errors import UserError
from msif_ray.influence.ekfac import Basis
from msif_ray.influence.kept import KEPT_SHARE

STEPS = {
    "passes": "forward and backward to the activations",
    "covariance": "covariances",
    "correction": "corrected eigenvalues",
    "correction_own_pass": "the same without what the covariances' pass kept",
}

# What ends the name of scores of the first number of queries, and what is said of them.
CURVATURE, LOW, LOW_ALONE = "_curvature", "_low_rank", "_low_rank_without_norms"
RANK = 8  # of those of low rank where no rank is given


@dataclass(frozen=True)
class Options:
    """`queries`: for how many each scoring is timed; `rank`: of directions of random numbers (None: real queries,
    carried back, exact); `keep`: bytes for what the covariances' pass captured; `eigh_maps`: how many maps are
    decomposed, and the time scaled to all (None: all; 0: none, and random numbers are rotated by)."""

    queries: tuple[int, ...] = (8, 64)
    rank: int | None = None
    repeats: int = 3
    keep: int = 0
    eigh_maps: int | None = None


def measure(workload: Workload, options: Options) -> dict[str, Any]:
    """Seconds of a training pass, and every step's ratio to it (`eigh_s` in seconds).

    In parts, each with training passes of its own: what one part holds is gone before the next.
    """
    steps = Steps(workload, keep=options.keep)
    timed: list[dict[str, float]] = []

    def time(**each: Callable[[], object]) -> None:
        timed.append(interleaved({"train": steps.train} | each, workload.device, options.repeats))

    time(passes=steps.passes, covariance=steps.covariance)
    bases, eigh_s = _bases(steps, options)
    kept = steps.kept.bytes
    _correct(steps, bases, time)
    eigenvalues = steps.correction(bases) if options.rank is None else {}
    directions = {n: steps.directions(bases, eigenvalues, n, options.rank) for n in options.queries}
    metrics, few = steps.metrics(bases, eigenvalues), options.queries[0]
    del bases, eigenvalues
    time(**{f"score_q{few}{CURVATURE}": partial(steps.score, directions[few], metrics)})
    del metrics
    time(**{f"score_q{n}": partial(steps.score, each) for n, each in directions.items()})
    del directions
    low = steps.directions({}, {}, few, options.rank or RANK)
    scores = {LOW: partial(steps.score, low), LOW_ALONE: partial(steps.score, low, norms=False)}
    time(**{f"score_q{few}{kind}": score for kind, score in scores.items()})
    train = statistics.median(each["train"] for each in timed)
    ratios = {name: taken / each["train"] for each in timed for name, taken in each.items() if name != "train"}
    found: dict[str, Any] = {"train_s": train, "eigh_s": eigh_s, "low_rank": options.rank or RANK} | ratios
    found["fit_total"] = None if eigh_s is None else ratios["covariance"] + ratios["correction"] + eigh_s / train
    found["kept_mib"] = kept / 2**20
    found["peak_rss_mib"] = peak_mebibytes(workload.device)
    return found | _throughput(workload, steps, train, ratios)


def kept_memory(gibibytes: float | None, device: str, threads: int) -> int:
    """Bytes for what a first pass captured: as many as are said, or what a run's rank takes by default. Raises
    UserError for a size that is no number of bytes."""
    if gibibytes is not None:
        if not math.isfinite(gibibytes):
            raise UserError(f"--keep: {gibibytes} is no number of GiB")
        return int(gibibytes * 2**30)
    if torch.device(device).type == "cuda":
        return 0
    return int(KEPT_SHARE * free_memory(torch.device(device), threads))


def _correct(steps: Steps, bases: dict[str, Basis], time: Callable[..., None]) -> None:
    """Times the corrected eigenvalues: from what was kept, and then by a pass of their own, if anything was."""
    correct = partial(steps.correction, bases)
    time(correction=correct)
    if steps.kept.bytes:
        steps.forget()
        time(correction_own_pass=correct)


def _bases(steps: Steps, options: Options) -> tuple[dict[str, Basis], float | None]:
    """Every map's basis, and the seconds that the decompositions take."""
    names = list(steps.maps)
    chosen = names[: options.eigh_maps]
    bases, taken = _decompose(steps, chosen) if chosen else ({}, 0.0)
    of_shape = {steps.maps[name].shape: basis for name, basis in bases.items()}
    for name, described in steps.maps.items():
        if name not in bases:  # a copy of another of its shape is the same work, and takes the same memory
            like = of_shape.get(described.shape) or steps.random_basis(described)
            bases[name] = Basis(like.activations.clone(), like.gradients.clone())
    return bases, taken * _cubes(steps, names) / _cubes(steps, chosen) if chosen else None


def _decompose(steps: Steps, names: list[str]) -> tuple[dict[str, Basis], float]:
    sums, bases = steps.covariance(), dict[str, Basis]()
    taken = seconds(lambda: bases.update(steps.bases(sums, names)), steps.workload.device)
    return bases, taken


def _cubes(steps: Steps, names: list[str]) -> float:
    """What eigendecompositions cost is in proportion to: cubes of dimensions."""
    return float(sum(side**3 for name in names for side in steps.maps[name].shape))


def _throughput(workload: Workload, steps: Steps, train: float, ratios: Mapping[str, float]) -> dict[str, Any]:
    """Tokens per second of each step, and TFLOP/s of the training pass: 6 per weight of a linear map and token, and of
    attention's two products in every layer 4·n²·hidden forward and twice that backward, of a document of n tokens."""
    lengths = workload.lengths()
    tokens = sum(lengths)
    padded = sum(batch.attention_mask.numel() for batch in steps.batches)
    head = steps.model.get_output_embeddings()
    weights = sum(described.parameters for described in steps.maps.values()) + head.weight.numel()
    attention = 12.0 * workload.shape.layers * workload.shape.hidden * sum(length**2 for length in lengths)
    flops = 6.0 * weights * tokens + attention
    return {
        "tokens": tokens,
        "padding": 1 - tokens / padded,
        "tokens_per_s": {name: tokens / train / each for name, each in ratios.items()},
        "train_tflops": flops / train / 1e12,
    }


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on: the processor, or the GPU where the device is one."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older PyTorch does not tell
    processor = capabilities.get("cpu_name") or platform.machine()
    name = torch.cuda.get_device_name() if device == "cuda" else processor
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def show(found: Mapping[str, Any], console: Console) -> None:
    """A table of the steps beside the training pass."""
    table = Table(title=f"training pass: {found['train_s']:.3f} s, {found['tokens']:,} tokens")
    for column in ("step", "ratio to a training pass", "tokens/s"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name, rate in found["tokens_per_s"].items():
        table.add_row(STEPS.get(name) or _scores(name, found["low_rank"]), f"{found[name]:.3f}", f"{rate:,.0f}")
    if found["eigh_s"] is not None:
        table.add_row("eigendecompositions", f"{found['eigh_s'] / found['train_s']:.3f}", "")
        table.add_row("the fit together", f"{found['fit_total']:.3f}", "")
    for name, value in found.get("kronfluence", {}).items():
        table.add_row(
            f"kronfluence: {name}", f"{value / found['train_s']:.3f}" if name.endswith("_s") else f"{value:.2g}", ""
        )
    for name in ("ray_overhead", "ray_overhead_two_replicas", "replica_scaling"):
        if found.get(name) is not None:
            table.add_row(f"{name.replace('_', ' ')} ({found['ray_documents']:,} documents)", f"{found[name]:.3f}", "")
    table.add_row("kept of the covariances' pass", f"{found['kept_mib']:,.0f} MiB", "")
    table.add_row("peak memory", f"{found['peak_rss_mib']:,.0f} MiB", "")
    console.print(table)


def _scores(name: str, rank: int) -> str:
    """What a step that scores is called."""
    queries, _, kind = name.removeprefix("score_q").partition("_")
    beside = {
        CURVATURE: ", with norms in the inverse curvature",
        LOW: f" of rank {rank}",
        LOW_ALONE: f" of rank {rank}, without norms",
    }
    return f"scores of {queries} queries{beside.get(f'_{kind}', '')}"


def check_device(device: str) -> None:
    """Raises UserError for a device that nothing is timed on, or that is not there. The clock is that of the process's
    one GPU, so none is chosen by number."""
    if device not in ("cpu", "cuda"):
        raise UserError(
            f"--device: steps are timed on cpu and on cuda, not on {device!r}; CUDA_VISIBLE_DEVICES chooses a GPU"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: PyTorch has no CUDA GPU here; name cpu")


def check_writable(path: Path) -> None:
    """Makes the folder of a file that is to be written after all is measured, and no file yet. Raises UserError where
    it cannot be written."""
    there = os.path.lexists(path)
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a", encoding="utf-8").close()
        if not there:
            path.unlink()


def write(found: Mapping[str, Any], path: Path) -> None:
    """The figures as JSON. Raises UserError where the file cannot be written."""
    with _writing(path):
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--json: {path} cannot be written: {error.strerror}") from None
