"""Gauss-Newton products of families: experts, blocks, and an activation that forbids them."""

import families
import models
import pipeline
import pytest
import reference
import torch
from test_families import ANSWERS

from msif_ray.errors import UserError
from msif_ray.influence.capture import Capture
from msif_ray.influence.modules import find_linear_maps


def curved(model, maps, direction):
    """The Gauss-Newton Hessian of two windows times a direction, by the package, `[out, columns]` by map."""
    encoded, _ = pipeline.encode_rows(reference.StageSpec("s", model, models.build_tokenizer(), []), ANSWERS[:2])
    batch = pipeline.to_batch([next(document.windows(len(document.ids))) for document in encoded])
    with Capture(model, maps) as capture:
        found = capture.curve(batch, direction)
    return {n: torch.einsum("rto,rti->oi", found.gradients(n), found.activations(n)) for n in maps}


@pytest.mark.parametrize("family", ("mixtral", "gpt_oss"))
def test_gauss_newton_products_of_experts(family):
    """Against forward and reverse differentiation in the weights of the loose model, window by window."""
    model = families.build(family, 0)
    loose, tokenizer, maps = families.loosened(model), models.build_tokenizer(), find_linear_maps(model)
    generator = torch.Generator().manual_seed(0)
    direction = {n: torch.randn(m.shape, generator=generator, dtype=torch.float64) for n, m in maps.items()}
    moved = {f"{n}.weight": v[:, :-1] if maps[n].bias else v for n, v in direction.items()}
    moved |= {f"{n}.bias": v[:, -1] for n, v in direction.items() if maps[n].bias}
    weights = {name: loose.get_parameter(name).detach() for name in moved}
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    with families.Exact():
        found = curved(model, maps, direction)
        for document in ANSWERS[:2]:
            ids, targets = reference.tokenise(tokenizer, document)

            def logits(weights, ids=ids, targets=targets):
                every = torch.func.functional_call(loose, weights, kwargs={"input_ids": torch.tensor([ids])}).logits[0]
                return every[torch.tensor([*targets[1:], False])]

            values, tangents = torch.func.jvp(logits, (weights,), (moved,))
            p = values.softmax(-1)
            outer = p * (tangents - (p * tangents).sum(-1, keepdim=True))
            (product,) = torch.func.vjp(logits, weights)[1](outer)
            total = {name: total[name] + product[name] for name in total}
    for name, described in maps.items():
        expected = total[f"{name}.weight"]
        if described.bias:
            expected = torch.cat([expected, total[f"{name}.bias"][:, None]], dim=1)
        torch.testing.assert_close(
            found[name], expected, rtol=1e-8, atol=1e-9 * float(expected.detach().abs().max() + 1)
        )


def test_gauss_newton_products_of_blocks_are_the_rows_of_the_whole():
    model = families.build("gpt_neox", 0)
    whole, blocks = find_linear_maps(model), find_linear_maps(model, None, "qkv")
    generator = torch.Generator().manual_seed(0)
    direction = {n: torch.randn(m.shape, generator=generator, dtype=torch.float64) for n, m in whole.items()}
    cut = {n: m.own(direction[m.source].T).T for n, m in blocks.items()}
    expected, found = curved(model, whole, direction), curved(model, blocks, cut)
    for name, described in blocks.items():
        torch.testing.assert_close(found[name], described.own(expected[described.source].T).T)


def test_a_family_with_an_activation_of_its_own_is_refused_by_cg():
    model = families.build("bloom", 0)  # its GELU is an autograd function without a forward-mode derivative
    maps = find_linear_maps(model)
    with pytest.raises(UserError, match=r"^solver: the model has an operation without a forward-mode derivative"):
        curved(model, maps, {n: torch.zeros(m.shape, dtype=torch.float64) for n, m in maps.items()})
