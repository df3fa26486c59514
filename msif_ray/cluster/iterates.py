"""The vectors of a solve by conjugate gradients on storage, a file per map, and the job that multiplies them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from msif_ray import layout
from msif_ray.influence.batch import Batch
from msif_ray.influence.capture import Capture, Captured
from msif_ray.influence.conjugate import Iterate
from msif_ray.influence.gauss_newton import ProductSums
from msif_ray.store import load_tensors, save_tensors

START, ANSWER = "start", "answer"


def iterate_name(number: int) -> str:
    return f"iterate-{number:04d}"


def save_start(solve: Path, map_name: str, right: Tensor, start: Tensor) -> None:
    """The right-hand sides b and EK-FAC's x = M⁻¹ b, `[queries, out, columns]`."""
    save_tensors(layout.solve_vectors(solve, START, map_name), {"right": right, "start": start}, {"map": map_name})


def load_start(solve: Path, map_name: str) -> tuple[Tensor, Tensor]:
    found = load_tensors(layout.solve_vectors(solve, START, map_name), part_of=solve)
    return found["right"], found["start"]


def save_iterate(solve: Path, number: int, map_name: str, iterate: Iterate) -> None:
    tensors = {
        "solution": iterate.solution,
        "residual": iterate.residual,
        "preconditioned": iterate.preconditioned,
    }
    if iterate.direction is not None:
        tensors["direction"] = iterate.direction
    save_tensors(layout.solve_vectors(solve, iterate_name(number), map_name), tensors, {"map": map_name})


def load_iterate(solve: Path, number: int, map_name: str) -> Iterate:
    found = load_tensors(layout.solve_vectors(solve, iterate_name(number), map_name), part_of=solve)
    return Iterate(found["solution"], found["residual"], found["preconditioned"], found.get("direction"))


@dataclass(frozen=True)
class ProductJob:
    """Σ over documents of N·H times a solve's vectors: EK-FAC's answers (`iterate` None), or an iterate's next
    directions with these `beta`, of `queries` alone (their numbers in the solve)."""

    solve: Path
    iterate: int | None
    beta: tuple[float, ...]
    queries: tuple[int, ...]
    sampled_labels: bool = False
    tracked: tuple[str, ...] | None = None

    def start(self, maps: Sequence[str], device: torch.device) -> "ProductWork":
        return ProductWork(ProductSums({name: self._vectors(name).to(device) for name in maps}))

    def _vectors(self, map_name: str) -> Tensor:
        if self.iterate is None:
            _, vectors = load_start(self.solve, map_name)
        else:
            iterate = load_iterate(self.solve, self.iterate, map_name)
            vectors = iterate.next_direction(torch.tensor(self.beta, dtype=torch.float64))
        return vectors[list(self.queries)]


@dataclass
class ProductWork:
    """A part per map: `P` `[queries, out, columns]`."""

    sums: ProductSums

    def add(self, captured: Captured) -> None:
        raise RuntimeError("products take passes of their own")

    def pass_over(self, capture: Capture, batch: Batch) -> Tensor:
        return self.sums.add(capture, batch)

    def parts(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, total in self.sums.sums.items():
            yield name, {"P": total.cpu()}
