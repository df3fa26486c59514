"""Experts that no token reaches: they take no part in factors, scores or strengths."""

import families
import pipeline
import pytest
import torch
from test_families import stages_of
from test_handled import captured

from msif_ray.config import Strength, parse_run
from msif_ray.errors import UserError
from msif_ray.influence.capture import Capture
from msif_ray.influence.modules import find_linear_maps
from msif_ray.influence.response import Identity, Nothing
from msif_ray.stages import response_of


def dead(model):
    """With an expert of the second layer that no token is ever sent to."""
    with torch.no_grad():
        model.model.layers[1].mlp.router.bias[2] = -1e6
    return model


def test_an_expert_that_no_token_reached_takes_no_part():
    stage = stages_of(dead(families.build("gpt_oss", 0)), None)[0]
    name = "model.layers.1.mlp.experts.2.down_proj"
    with families.Exact():
        fitted = pipeline.fit(stage, 90)
        scored = captured(stage.model)
    factor = fitted.factors[name]
    assert not factor.eigenvalues.any() and not scored.gradients(name).any()
    assert torch.equal(factor.basis.gradients.abs(), torch.eye(8, dtype=torch.float64))
    gradient = torch.randn(1, 8, 13, dtype=torch.float64)
    assert not factor.apply(Nothing(), gradient).any()
    assert all(f.eigenvalues.any() for other, f in fitted.factors.items() if "experts.2" not in other)


def test_the_backward_pass_comes_to_experts_whether_or_not_a_tracked_one_has_tokens():
    """Ranks that hold one model together gather its weights on the same way back."""
    model, came = dead(families.build("gpt_oss", 0)), []
    batch = captured(model).batch
    maps = {name: each for name, each in find_linear_maps(model).items() if "layers.1.mlp.experts.2." in name}
    model.model.layers[1].mlp.experts.register_forward_hook(lambda _, args, output: came.append(output.requires_grad))
    with Capture(model, maps) as capture:
        found = capture.run(batch)
    assert came == [True] and len(maps) == 2 and not any(found.gradients(name).any() for name in maps)


def test_strengths_of_an_expert_that_no_token_reached():
    stage = {"model": "m", "documents": {"path": "d", "text": "text"}, "damping": {"relative": 0.1}}
    run = {"run_dir": "r", "queries": {"path": "q"}, "score": [{"stage": "a"}]}
    made = parse_run(run | {"stages": [stage | {"name": "a"}, stage | {"name": "b"}]})
    assert response_of(made, 0, 0, "layers.1.experts.2.w1", 0.0) == (Nothing(), None)
    assert response_of(made, 1, 0, "layers.1.experts.2.w1", 0.0) == (Identity(), None)
    assert response_of(made, 0, 0, "layers.1.experts.2.w1", 2.0)[1] == pytest.approx(0.2)
    with pytest.raises(UserError, match=r"stages\.0\.damping: layers\.1\.mlp has no curvature"):
        response_of(made, 0, 0, "layers.1.mlp", 0.0)
    absolute = made.stages[0].model_copy(update={"damping": Strength(absolute=0.5)})
    made = made.model_copy(update={"stages": [absolute, made.stages[1]]})
    assert response_of(made, 0, 0, "layers.1.experts.2.w1", 0.0)[1] == 0.5
