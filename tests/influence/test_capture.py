"""Captured gradients against autograd on the weights, and the uses of a map that are refused by name."""

from types import SimpleNamespace

import families
import models
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, Qwen2MoeConfig

from msif_ray.errors import UserError
from msif_ray.influence.batch import Batch, WindowKey
from msif_ray.influence.capture import Capture
from msif_ray.influence.modules import find_linear_maps


class Toy(nn.Module):
    """A causal model of one block, whose way of using its map is a parameter."""

    def __init__(self, use):
        super().__init__()
        self.use = use
        self.embedding = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([nn.ModuleDict({"map": nn.Linear(6, 6), "other": nn.Linear(6, 6, bias=False)})])
        self.head = nn.Linear(6, 11)
        if use == "shared":
            self.layers[0]["other"].weight = self.layers[0]["map"].weight

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask, use_cache):
        x = self.embedding(input_ids).tanh().cumsum(1)
        first, other = self.layers[0]["map"], self.layers[0]["other"]
        if self.use == "twice":
            x = x + first(torch.tanh(first(x))) + other(x)
        elif self.use == "in place":
            seen = x * 1.0
            x = x + first(seen) + other(x)
            seen.add_(1)
        elif self.use == "unused":
            x = x + first(x)
        elif self.use == "dead end":
            other(x)
            x = x + first(x)
        elif self.use == "flat":
            x = x + first(x.reshape(-1, 6)).reshape(x.shape) + other(input=x)
        elif self.use == "rescaled":
            with torch.no_grad():
                first.weight.div_(2)
            x = x + first(x) + other(x)
        elif self.use == "tokens first":
            x = x + first(x.transpose(0, 1)).transpose(0, 1) + other(x)
        elif self.use == "one head":
            x = x + first(x[:, None])[:, 0] + other(x)
        elif self.use == "without gradients":
            with torch.no_grad():
                chosen = other(x) > 0
            x = x + first(x) * chosen
        return SimpleNamespace(logits=self.head(x))


def toy(use, seed=0):
    torch.manual_seed(seed)
    return Toy(use).double()


def ragged(seed=0):
    ids = torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(seed))
    attention = torch.arange(7) < torch.tensor([7, 4, 2])[:, None]
    targets = attention & (torch.arange(7) >= torch.tensor([1, 2, 1])[:, None])
    return Batch(ids, attention, targets, tuple(WindowKey(f"d{row}", 0) for row in range(3)))


def autograd(model, batch, row, name):
    """d loss / d [W b] of one row alone and unpadded, [out, columns], and the loss."""
    length = int(batch.attention_mask[row].sum())
    ids, target = batch.input_ids[row : row + 1, :length], batch.targets[row, 1:length]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1]
    loss = nn.functional.cross_entropy(logits[target], ids[0, 1:][target], reduction="sum")
    module = model.get_submodule(name)
    weights = [module.weight] if module.bias is None else [module.weight, module.bias]
    return torch.cat([g.reshape(6, -1) for g in torch.autograd.grad(loss, weights)], dim=1), loss


@pytest.mark.parametrize("use", ("twice", "flat", "one head"))
@pytest.mark.parametrize("seed", range(3))
def test_gradients_equal_autograd_row_by_row(use, seed):
    model, batch = toy(use, seed), ragged(seed)
    maps = find_linear_maps(model)
    with Capture(model, maps) as capture:
        captured = capture.run(batch)
    for name in maps:
        found = captured.gradients(name).transpose(1, 2) @ captured.activations(name)
        for row in range(3):
            expected, loss = autograd(model, batch, row, name)
            torch.testing.assert_close(found[row], expected, rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(captured.losses[row], loss.detach())
        tokens = captured.activations(name).shape[1]
        assert tokens == (14 if use == "twice" and name.endswith("map") else 7)
        assert captured.predicts(name).sum() == batch.targets.sum() * (tokens // 7)
        assert not captured.gradients(name)[~batch.attention_mask.repeat(1, tokens // 7)].any()


def softcapped():
    """A tiny model that bends its logits after the head: those of the chosen positions must be bent the same."""
    config = Gemma2Config(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0, attn_logit_softcapping=None,
        tie_word_embeddings=True, max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).double().eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
    return model


def test_the_head_sees_targets_alone_whatever_comes_after_it():
    model, batch, seen = softcapped(), ragged(), []
    handle = model.get_output_embeddings().register_forward_hook(lambda _, args, output: seen.append(args[0].shape))
    with Capture(model, find_linear_maps(model)) as capture:
        captured = capture.run(batch)
    handle.remove()
    assert seen == [(1, int(batch.targets.sum()), 16)]
    for row in range(3):
        length = int(batch.attention_mask[row].sum())
        ids, target = batch.input_ids[row : row + 1, :length], batch.targets[row, 1:length]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits[target], ids[0, 1:][target], reduction="sum")
        torch.testing.assert_close(captured.losses[row], loss.detach(), rtol=1e-6, atol=1e-6)
        for name in captured.maps:
            expected = torch.autograd.grad(loss, model.get_submodule(name).weight, retain_graph=True)[0]
            found = captured.gradients(name)[row].T @ captured.activations(name)[row]
            # The model's norms compute in float32 whatever its type.
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_the_backward_pass_ends_at_the_first_maps():
    model, batch, reached = models.build_model("gpt_neox", 0), ragged(), {}
    maps = find_linear_maps(model)
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: reached.update({name: args[0].requires_grad})
        )
        for name in maps
    ]
    with Capture(model, maps) as capture:
        capture.run(batch)
    for handle in handles:
        handle.remove()
    assert [name for name, does in reached.items() if not does] == [
        "gpt_neox.layers.0.attention.query_key_value",
        "gpt_neox.layers.0.mlp.dense_h_to_4h",  # its input is the embeddings' too: attention runs beside it
    ]


REFUSED = {
    "in place": "layers.0.map is changed in place",
    "unused": "layers.0.other is not used",
    "dead end": "layers.0.other is not reached",
    "without gradients": "layers.0.other is computed without gradients",
    "rescaled": r"layers\.0\.map\.weight is changed by the model's forward pass",
    "tokens first": r"layers.0.map sees \(7, 3, 6\)",
}


@pytest.mark.parametrize("use", REFUSED)
def test_a_use_without_gradients_per_document_is_refused_by_name(use):
    model = toy(use)
    with pytest.raises(UserError, match=REFUSED[use]), Capture(model, find_linear_maps(model)) as capture:
        capture.run(ragged())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_shared_weight_is_refused_by_name():
    with pytest.raises(UserError, match=r"layers\.0\.map shares its weight with layers\.0\.other"):
        find_linear_maps(toy("shared"))
    with pytest.raises(UserError, match=r"lm_head shares its weight with transformer\.wte"):
        find_linear_maps(models.build_model("gpt2", 0), ["lm_head"])


def test_nothing_is_left_on_the_model():
    model = toy("twice").train()
    model.layers[0].eval()
    model.head.bias.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    with Capture(model, find_linear_maps(model)) as capture:
        capture.run(ragged())
        assert not any(weight.requires_grad for weight in model.parameters())
    assert modes == [module.training for module in model.modules()]
    assert [name for name, weight in model.named_parameters() if not weight.requires_grad] == ["head.bias"]
    assert all(weight.grad is None for weight in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("kind", "router"), [("hunyuan_v1_moe", "mlp.gate.wg"), ("afmoe", "mlp.router.gate")])
def test_a_router_s_linear_map_is_not_tracked(kind, router):
    sizes = {"head_dim": families.HEAD, "moe_topk": [2, 2], "num_dense_layers": 0, "num_local_experts": 4}
    config = AutoConfig.for_model(kind, **(families.MIXTURE | sizes), vocab_size=11, pad_token_id=0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model.get_submodule(f"model.layers.1.{router}"), nn.Linear)
    assert not any(name.endswith(router) for name in find_linear_maps(model))


def test_a_gate_that_routes_nothing_is_tracked():
    config = Qwen2MoeConfig(**families.MIXTURE, shared_expert_intermediate_size=6, vocab_size=11)
    with torch.device("meta"):
        maps = find_linear_maps(AutoModelForCausalLM.from_config(config))
    assert "model.layers.1.mlp.shared_expert_gate" in maps and not any(name.endswith("mlp.gate") for name in maps)


def test_maps_are_found_by_glob_with_their_shapes():
    model = models.build_model("gpt2", 0)
    maps = find_linear_maps(model, ["*.mlp.*"])
    assert {m.shape for m in maps.values()} == {(24, 17), (16, 25)} and len(maps) == 4
    assert not any("lm_head" in name for name in find_linear_maps(model, ["*"]))
    llama = find_linear_maps(models.build_model("llama", 0))
    assert llama["model.layers.1.self_attn.k_proj"].shape == (8, 16) and len(llama) == 14
    assert list(find_linear_maps(toy("flat"), ["head"])) == ["head"]
    with pytest.raises(UserError, match=r"'\*\.nothing' matches no linear map"):
        find_linear_maps(model, ["*.mlp.*", "*.nothing"])
