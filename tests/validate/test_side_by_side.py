"""Models trained side by side against the same models trained one by one with plain autograd, in float64."""

import copy
import math

import models
import pytest
import reference
import torch
from influence import pipeline
from torch import nn

from msif_ray.demo.training import Schedule, share_of_rate
from msif_ray.influence.batch import Batch
from msif_ray.validate import side_by_side
from msif_ray.validate.pipeline import rows
from msif_ray.validate.side_by_side import Stack

SUBSETS = [[0, 2, 3, 6, 7], [1, 2, 4, 5, 6], [0, 1, 5, 6, 7]]
EPOCHS, RATE, DECAY, AT_ONCE, SEED = 2, 0.05, 0.1, 2, 5


@pytest.fixture(scope="module")
def stage() -> reference.StageSpec:
    model = models.build_model("gpt_neox", seed=4, hidden=8, intermediate=12, layers=1)
    documents = models.random_documents(1, 8, (3, 9), completions=True)
    return reference.StageSpec("tiny", model, models.build_tokenizer(), documents)


@pytest.fixture(scope="module")
def batch(stage: reference.StageSpec) -> Batch:
    return rows(pipeline.encode_rows(stage, stage.documents)[0])


def schedule(batch: Batch) -> Schedule:
    return Schedule(EPOCHS, RATE, DECAY, AT_ONCE * batch.input_ids.shape[1])


def nll(stage: reference.StageSpec, model: nn.Module, place: int) -> tuple[torch.Tensor, int]:
    """A document's summed negative log-likelihood by the reference, batch 1, and its targets."""
    ids, targets = reference.tokenise(stage.tokenizer, stage.documents[place])
    return reference.summed_nll(model, ids, reference.data_labels(ids, targets)), sum(targets)


def alone(stage: reference.StageSpec, batch: Batch, subset: list[int]) -> nn.Module:
    """One model with torch's AdamW, a document at a time."""
    model = copy.deepcopy(stage.model)
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98))
    lengths = batch.attention_mask.sum(1).tolist()
    orders = list(side_by_side._orders([subset], lengths, AT_ONCE, EPOCHS, SEED))
    assert len(orders) == EPOCHS * math.ceil(len(subset) / AT_ONCE)
    for epoch in range(EPOCHS):
        part = orders[epoch * len(orders) // EPOCHS : (epoch + 1) * len(orders) // EPOCHS]
        assert sorted(torch.cat(part, dim=1)[0].tolist()) == subset
    for step, places in enumerate(orders):
        for group in optimizer.param_groups:
            group["lr"] = RATE * share_of_rate(step / len(orders))
        losses, targets = zip(*(nll(stage, model, place) for place in places[0].tolist()), strict=True)
        optimizer.zero_grad()
        (sum(losses) / sum(targets)).backward()
        optimizer.step()
    return model


def test_models_side_by_side_are_the_models_trained_alone(stage: reference.StageSpec, batch: Batch) -> None:
    stack = side_by_side.train(Stack.copies(stage.model, 3), batch, SUBSETS, schedule(batch), SEED)
    likelihoods = side_by_side.log_likelihoods(stack, batch)
    moved = 0.0
    for place, subset in enumerate(SUBSETS):
        model = alone(stage, batch, subset)
        start = dict(stage.model.named_parameters())
        for name, weight in model.named_parameters():
            assert torch.allclose(stack.state(place)[name], weight, rtol=0, atol=1e-9), name
            moved = max(moved, float((weight - start[name]).detach().abs().max()))
        for row in range(len(batch.keys)):
            assert float(likelihoods[place, row]) == pytest.approx(-float(nll(stage, model, row)[0].detach()), rel=1e-8)
    assert moved > 0.1  # or they would agree by standing still


def test_a_model_never_sees_what_is_not_its_own(stage: reference.StageSpec, batch: Batch) -> None:
    def trained(tokens: torch.Tensor) -> Stack:
        other = Batch(tokens, batch.attention_mask, batch.targets, batch.keys)
        return side_by_side.train(Stack.copies(stage.model, 3), other, SUBSETS, schedule(batch), SEED)

    changed = batch.input_ids.clone()
    changed[1] = (changed[1] + 7) % len(models.VOCABULARY)  # in the second and third subsets alone
    before, after = trained(batch.input_ids), trained(changed)
    same = [all(torch.equal(before.state(i)[n], after.state(i)[n]) for n in before.weights) for i in range(3)]
    assert same == [True, False, False]


def test_settling_ends_where_the_loss_and_the_proximal_term_balance(stage: reference.StageSpec, batch: Batch) -> None:
    """At the minimum ∇L(θ) = α (θ₀ − θ), L the mean over documents of summed negative log-likelihood."""
    alpha = 20.0
    started = Stack.copies(stage.model, 2)
    settled = side_by_side.settle(started, batch, alpha, 120, 0.03)
    assert float(settled.gradient.max()) < 1e-2
    model = copy.deepcopy(stage.model)
    model.load_state_dict(settled.stack.state(1))
    sum(nll(stage, model, place)[0] for place in range(len(batch.keys))).backward()
    start = dict(stage.model.named_parameters())
    slopes = torch.cat([weight.grad.flatten() / len(batch.keys) for weight in model.parameters()])
    away = torch.cat([(start[name] - weight).detach().flatten() for name, weight in model.named_parameters()])
    assert float((slopes - alpha * away).norm()) < 0.02 * float(slopes.norm())
    assert all(torch.equal(weight, start[name]) for name, weight in started.state(0).items())
