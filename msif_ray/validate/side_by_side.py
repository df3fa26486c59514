"""Many models of one architecture trained side by side, each on documents of its own.

Their weights are stacked, `[models, ...]` each, a step of all of them is one call under `torch.func.vmap`, and AdamW,
which works entry by entry, is torch's own on the stacked weights. A model trained so is the model that is trained
alone (tests/validate/test_side_by_side.py).
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from msif_ray.demo.training import Schedule, share_of_rate
from msif_ray.influence.batch import Batch

Weights = dict[str, Tensor]
"""By parameter, `[models, ...]`."""

SETTLE_BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class Stack:
    """Weights of models side by side; `model` gives the architecture, and its own weights are not used."""

    model: nn.Module
    weights: Weights

    @classmethod
    def copies(cls, model: nn.Module, count: int) -> "Stack":
        return cls(model, {name: weight.detach().expand(count, *weight.shape).clone() for name, weight in _own(model)})

    def __len__(self) -> int:
        return len(next(iter(self.weights.values())))

    def state(self, place: int) -> dict[str, Tensor]:
        """The weights of one of the models."""
        return {name: weight[place].detach().clone() for name, weight in self.weights.items()}

    def losses(self, rows: Batch, places: Tensor) -> tuple[Tensor, Tensor]:
        """Summed negative log-likelihoods in nats of the rows at `places` `[models, rows]`, each model its own, and how
        many targets these have, `[models, rows]` both."""
        tokens = rows.input_ids[places]
        targets = rows.targets[places]
        length = int(rows.attention_mask[places].sum(-1).max())  # no more padding than these rows need
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no rule for vmap
            found = vmap(self._losses)(self.weights, tokens[..., :length], targets[..., :length])
        return found, targets.sum(-1)

    def _losses(self, weights: Weights, tokens: Tensor, targets: Tensor) -> Tensor:
        """Right padding needs no mask here: attention is causal, and padded positions have no target."""
        logits = functional_call(self.model, weights, (), {"input_ids": tokens, "use_cache": False}).logits
        terms = cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        return (terms * targets[:, 1:]).sum(1)


def train(stack: Stack, rows: Batch, subsets: Sequence[Sequence[int]], schedule: Schedule, seed: int) -> Stack:
    """AdamW on the mean negative log-likelihood of a batch's targets (5 % warm-up, cosine to zero), each model on the
    rows of its own subset. All subsets have the same size.

    All models meet the rows in one order, drawn anew for each epoch, each leaving out those not its own; a batch is of
    similar lengths, as in `demo.training`. `schedule.tokens_per_batch` counts padding to the longest row of all.
    """
    at_once = schedule.tokens_per_batch // rows.input_ids.shape[1]
    lengths = rows.attention_mask.sum(1).tolist()
    steps = schedule.epochs * math.ceil(len(subsets[0]) / at_once)
    weights = _trained(stack)
    decayed = [weight for name, weight in weights.items() if stack.weights[name].dim() > 2]
    others = [weight for name, weight in weights.items() if stack.weights[name].dim() <= 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": schedule.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=schedule.rate,
        betas=(0.9, 0.98),
    )
    moving = Stack(stack.model, weights)
    for step, places in enumerate(_orders(subsets, lengths, at_once, schedule.epochs, seed)):
        _set_rate(optimizer, schedule.rate * share_of_rate(step / steps))
        losses, targets = moving.losses(rows, places)
        _step(optimizer, (losses.sum(1) / targets.sum(1)).sum())
    return Stack(stack.model, {name: weight.detach() for name, weight in weights.items()})


@dataclass(frozen=True)
class Settled:
    """Models at the minimum of a stage's loss with its proximal term, and how near: the gradient's norm at the end as
    a share of that at the beginning, `[models]`."""

    stack: Stack
    gradient: Tensor


def settle(stack: Stack, rows: Batch, alpha: float, steps: int, rate: float) -> Settled:
    """argmin L(θ) + (α/2) ‖θ − θ₀‖² from θ₀, the stack's own weights; L is the mean over rows of summed negative
    log-likelihood (DESIGN.md §2): Adam with all rows in every step, its rate falling to zero."""
    places = torch.arange(len(rows.keys)).expand(len(stack), -1)
    weights = _trained(stack)
    optimizer = torch.optim.Adam(weights.values(), lr=rate, betas=SETTLE_BETAS)
    moving, first = Stack(stack.model, weights), torch.zeros(len(stack))
    for step in range(steps + 1):
        losses, _ = moving.losses(rows, places)
        away = sum((weight - stack.weights[name]).square().sum() for name, weight in weights.items())
        optimizer.zero_grad()
        (losses.mean(1).sum() + alpha / 2 * away).backward()
        if step == 0:
            first = _gradient_norms(weights)
        if step < steps:
            _set_rate(optimizer, rate * share_of_rate(step / steps))
            optimizer.step()
    last = _gradient_norms(weights)
    return Settled(Stack(stack.model, {name: weight.detach() for name, weight in weights.items()}), last / first)


def log_likelihoods(stack: Stack, rows: Batch) -> Tensor:
    """Of every row's targets under every model, in nats, `[models, rows]` in float64."""
    with torch.no_grad():
        losses, _ = stack.losses(rows, torch.arange(len(rows.keys)).expand(len(stack), -1))
    return -losses.double()


def _own(model: nn.Module) -> list[tuple[str, Tensor]]:
    return list(model.named_parameters())


def _trained(stack: Stack) -> Weights:
    return {name: weight.clone().requires_grad_() for name, weight in stack.weights.items()}


def _orders(
    subsets: Sequence[Sequence[int]], lengths: Sequence[int], at_once: int, epochs: int, seed: int
) -> Iterator[Tensor]:
    """Places `[models, at_once]` of every step; an epoch's batches are of similar lengths and one has fewer rows."""
    rng = random.Random(seed)
    for _ in range(epochs):
        drawn = [rng.random() for _ in lengths]
        mine = torch.tensor([sorted(subset, key=lambda place: (lengths[place], drawn[place])) for subset in subsets])
        batches = list(mine.split(at_once, dim=1))
        rng.shuffle(batches)
        yield from batches


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _gradient_norms(weights: Weights) -> Tensor:
    gradients = [weight.grad for weight in weights.values() if weight.grad is not None]
    return torch.stack([each.double().flatten(1).square().sum(1) for each in gradients]).sum(0).sqrt()
