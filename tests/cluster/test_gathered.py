"""Gathered weights are not kept for the backward pass, however a model uses them."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from msif_ray.cluster.gathered import keep_no_gathered_weights


class Odd(nn.Module):
    """Uses a weight as it is, transposed, and in parts; and one that ranks keep whole."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.square = nn.Parameter(torch.randn(6, 6, generator=generator), requires_grad=False)
        self.experts = nn.Parameter(torch.randn(3, 5, 6, generator=generator), requires_grad=False)
        self.small = nn.Parameter(torch.randn(6, generator=generator), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = (functional.linear(inputs, self.square) @ self.square.T).tanh()
        return functional.linear(hidden, self.experts[2]) @ self.experts[1] * self.small


def gradient(model: nn.Module, freed: bool) -> Tensor:
    """Of the outputs' squares at the inputs; with `freed` weights go between the passes, and come back elsewhere."""
    inputs = torch.linspace(-1, 1, 12).view(2, 6).requires_grad_(True)
    outputs = model(inputs)
    for weight in (model.square, model.experts) if freed else ():
        gone = weight.data
        weight.data = gone.clone()
        gone.fill_(torch.nan)
    outputs.square().sum().backward()
    assert inputs.grad is not None
    return inputs.grad


def test_weights_that_are_freed_between_the_passes_are_taken_from_where_they_are_then() -> None:
    wanted = gradient(Odd(), freed=False)
    assert gradient(Odd(), freed=True).isnan().all(), "autograd kept none by itself"
    model = Odd()
    for weight in model.parameters():
        weight.ds_persist = weight is model.small  # type: ignore[attr-defined]
    keep_no_gathered_weights(model)
    for _ in range(2):
        torch.testing.assert_close(gradient(model, freed=True), wanted, rtol=0, atol=0)
