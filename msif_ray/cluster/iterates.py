"""The vectors of a solve by conjugate gradients on storage, a file per map, and the job that multiplies them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from msif_ray import layout
from msif_ray.influence.batch import Batch
from msif_ray.influence.capture import Capture, Captured
from msif_ray.influence.conjugate import Iterate, Step
from msif_ray.influence.gauss_newton import ProductSums
from msif_ray.store import load_tensors, save_tensors

# What the queries are after the stage, and what EK-FAC alone makes of them.
ANSWER, EKFAC = "answer", "ekfac"


def iterate_name(number: int) -> str:
    return f"iterate-{number:04d}"


def save_answer(solve: Path, what: str, map_name: str, answer: Tensor) -> None:
    """`[queries, out, columns]`, as ANSWER or EKFAC."""
    save_tensors(layout.solve_vectors(solve, what, map_name), {"answer": answer}, {"map": map_name})


def load_answer(solve: Path, what: str, map_name: str) -> Tensor:
    return load_tensors(layout.solve_vectors(solve, what, map_name), part_of=solve)["answer"]


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
    """Σ over documents of N·H times the directions of a solve's step after an `iterate`, of the queries that are going
    on alone."""

    solve: Path
    iterate: int
    step: Step
    sampled_labels: bool = False
    tracked: tuple[str, ...] | None = None

    def start(self, maps: Sequence[str], device: torch.device) -> "ProductWork":
        return ProductWork(ProductSums({name: self._vectors(name).to(device) for name in maps}))

    def _vectors(self, map_name: str) -> Tensor:
        return load_iterate(self.solve, self.iterate, map_name).next_direction(self.step)[self.step.going]


@dataclass
class ProductWork:
    """A part per map: `P` `[queries, out, columns]`."""

    sums: ProductSums

    def add(self, captured: Captured) -> None:
        raise RuntimeError("products take passes of their own")

    def pass_over(self, capture: Capture, batch: Batch) -> Tensor:
        return self.sums.add(capture, batch)

    def negate(self) -> None:
        self.sums.negate()

    def parts(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, total in self.sums.sums.items():
            yield name, {"P": total.cpu()}
