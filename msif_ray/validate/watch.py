"""A solve that is watched: scores of its iterates, kept with its state so that it goes on where it was."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from msif_ray.influence.conjugate import (
    Damped,
    Iterate,
    Numbers,
    State,
    Vectors,
    inner_by_query,
    solve,
    sum_over_maps,
)
from msif_ray.store import load_tensors, save_tensors
from msif_ray.validate.joint import joined, parted
from msif_ray.validate.problem import Problem, Scores

# Iterations whose scores are compared with the last one's.
LOOKED_AT = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# Iterations after which the state is written: some 20 s of them at hidden 256.
KEPT_EVERY = 8


@dataclass
class Watch:
    """A solve's states as they come: `scores` by iteration, the `seconds` up to every iteration, scores not counted,
    and the last state in `path`. It is `joint` where all maps are one (`joint.py`)."""

    path: Path
    problem: Problem
    say: Callable[[str], None]
    joint: bool = False
    scores: dict[int, Scores] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=lambda: [0.0])
    _since: float = 0.0

    def solve(self, systems: Mapping[str, Damped], iterations: int, tolerance: float) -> State:
        """On from the state that is kept, if there is one, for so many iterations in all."""
        gradients = self.problem.query_gradients
        state = self._kept() or State.begun(systems, joined(gradients) if self.joint else gradients)
        self._since = time.monotonic()
        return solve(systems, state, self._product, iterations, tolerance, self._seen)

    def solution(self, state: State) -> Vectors:
        """By map."""
        return parted(state.solution, self.problem.setting.maps) if self.joint else state.solution

    def _product(self, directions: Vectors) -> Vectors:
        if not self.joint:
            return self.problem.product(directions)
        return joined(self.problem.product(parted(directions, self.problem.setting.maps)))

    def _seen(self, state: State) -> None:
        self.seconds.append(self.seconds[-1] + time.monotonic() - self._since)
        relative = state.numbers.relative
        self.say(
            f"  iteration {state.iterations}: relative residual {float(relative.median()):.2e}, at most "
            f"{float(relative.max()):.2e}"
        )
        if state.iterations in LOOKED_AT:
            self.scores[state.iterations] = self.problem.scores(self.solution(state))[0]
        if state.iterations % KEPT_EVERY == 0:
            self._keep(state)
        self._since = time.monotonic()

    def _keep(self, state: State) -> None:
        tensors = {f"numbers/{name}": value for name, value in vars(state.numbers).items()}
        for name, iterate in state.iterates.items():
            tensors |= {f"{part}/{name}": value for part, value in vars(iterate).items()}
        tensors |= {f"scores/{number}": torch.from_numpy(scores) for number, scores in self.scores.items()}
        tensors |= {"residuals": torch.stack(state.residuals), "seconds": torch.tensor(self.seconds).double()}
        save_tensors(self.path, tensors)

    def _kept(self) -> State | None:
        if not self.path.exists():
            return None
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in load_tensors(self.path).items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = value
        self.scores |= {int(number): scores.numpy() for number, scores in parts["scores"].items()}
        self.seconds[:] = parts["seconds"][""].tolist()
        iterates = {
            name: Iterate(*(parts[part][name] for part in ("solution", "residual", "preconditioned", "direction")))
            for name in parts["solution"]
        }
        return State(iterates, Numbers(**parts["numbers"]), tuple(parts["residuals"][""]))


def true_residuals(problem: Problem, damping: Mapping[str, float], solution: Vectors) -> Tensor:
    """‖b − (H + C) x‖ / ‖b‖ by a product of its own, `[queries]`: rounding lets the steps' own drift from it."""
    right, products = problem.query_gradients, problem.product(solution)
    beyond = {name: right[name] - products[name] - damping[name] * solution[name] for name in right}
    over, under = (
        sum_over_maps(inner_by_query(vectors, vectors) for vectors in each.values()) for each in (beyond, right)
    )
    return (over / under).sqrt()
