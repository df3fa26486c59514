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
_ITERATE = ("solution", "residual", "preconditioned")


def iterate_name(number: int) -> str:
    return f"iterate-{number:04d}"


def solve_said(solve: Path) -> dict[str, str]:
    """What files of a solve say of its place: of which scores, stage and queries it is."""
    return {"solve": "/".join(solve.parts[-4:])}


def _said(solve: Path, what: str, map_name: str) -> dict[str, str]:
    """What a file of vectors says of itself."""
    return {"map": map_name, "vectors": what} | solve_said(solve)


def save_answer(solve: Path, what: str, map_name: str, answer: Tensor) -> None:
    """`[queries, out, columns]`, as ANSWER or EKFAC."""
    save_tensors(layout.solve_vectors(solve, what, map_name), {"answer": answer}, _said(solve, what, map_name))


def load_answer(solve: Path, what: str, map_name: str) -> Tensor:
    return _load(solve, what, map_name, ["answer"])["answer"]


def save_iterate(solve: Path, number: int, map_name: str, iterate: Iterate) -> None:
    tensors = {name: getattr(iterate, name) for name in _ITERATE}
    if iterate.direction is not None:
        tensors["direction"] = iterate.direction
    what = iterate_name(number)
    save_tensors(layout.solve_vectors(solve, what, map_name), tensors, _said(solve, what, map_name))


def load_iterate(solve: Path, number: int, map_name: str) -> Iterate:
    found = _load(solve, iterate_name(number), map_name, _ITERATE)
    solution, residual, preconditioned = (found[name] for name in _ITERATE)
    return Iterate(solution, residual, preconditioned, found.get("direction"))


def _load(solve: Path, what: str, map_name: str, wanted: Sequence[str]) -> dict[str, Tensor]:
    path = layout.solve_vectors(solve, what, map_name)
    return load_tensors(path, solve, _said(solve, what, map_name), wanted)


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
