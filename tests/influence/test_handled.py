"""Models in ways that people have them, handled or refused by name: families that nobody told us of, experts that are
modules, shared layers, checkpointing, kinds of attention, bfloat16, dead experts, blocks that are not known."""

import copy

import families
import models
import pipeline
import pytest
import reference
import torch
from test_families import ANSWERS, compare, stages_of
from torch import nn
from transformers import AutoModelForCausalLM, DbrxConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from msif_ray.errors import UserError
from msif_ray.influence.capture import Capture
from msif_ray.influence.modules import find_linear_maps


class HomemadeConfig(PretrainedConfig):
    model_type = "homemade"

    def __init__(self, kind="plain", size=8, vocab=None, **rest):
        super().__init__(**rest)
        self.kind, self.hidden_size, self.num_attention_heads = kind, size, 2
        self.vocab_size = vocab or len(models.VOCABULARY)


class Expert(nn.Module):
    def __init__(self, size, inner=10):
        super().__init__()
        self.w1, self.w2 = nn.Linear(size, inner), nn.Linear(inner, size, bias=False)

    def forward(self, x):
        return self.w2(torch.tanh(self.w1(x)))


class Mixture(nn.Module):
    """Two of three experts by token, each given the tokens it is sent to, in the order of its own making."""

    def __init__(self, size, scaled=False):
        super().__init__()
        self.router = nn.Parameter(torch.empty(3, size))
        self.experts = nn.ModuleList([Expert(size) for _ in range(3)])
        self.scaled = scaled

    def forward(self, hidden):
        flat = hidden.reshape(-1, hidden.shape[-1])
        weights, chosen = (flat @ self.router.T).softmax(-1).topk(2)
        total = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, slot = (chosen == number).nonzero(as_tuple=True)
            token, slot = token.flip(0), slot.flip(0)
            if len(token):
                picked = flat[token] * 1.5 if self.scaled else flat[token]
                total = total.index_add(0, token, weights[token, slot, None] * expert(picked))
        return total.view_as(hidden)


class Layer(nn.Module):
    """Mixes tokens with the mean of those before them; what it is made of depends on the kind."""

    def __init__(self, config):
        super().__init__()
        size = config.hidden_size
        self.mix = nn.Linear(size, size, bias=False)
        self.qkv = nn.Linear(size, 3 * size) if config.kind == "fused" else None
        self.shape = nn.Parameter(torch.empty(2, size, size)) if config.kind == "matrices" else None
        mixture = config.kind in ("mixture", "scaled")
        self.moe = Mixture(size, config.kind == "scaled") if mixture else None
        self.mlp = None if mixture else Expert(size)

    def forward(self, x, mask):
        mean = (x * mask).cumsum(1) / mask.cumsum(1).clamp_min(1)
        x = x + torch.tanh(self.mix(mean))
        x = x if self.shape is None else x + torch.einsum("boi,rti->rto", self.shape, x)
        x = x if self.qkv is None else x + self.qkv(x)[..., :8].tanh()
        return x + (self.moe(x) if self.mlp is None else self.mlp(x))


class Homemade(PreTrainedModel):
    config_class = HomemadeConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = [Layer(config), Layer(config)]
        self.layers = nn.ModuleList([layers[0], layers[0], layers[1]] if config.kind == "repeated" else layers)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        mask = (torch.ones_like(input_ids) if attention_mask is None else attention_mask)[..., None]
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, mask)
        return CausalLMOutput(logits=self.head(x))


def homemade(kind, seed=0):
    return models.randomise(Homemade(HomemadeConfig(kind)), seed)


class EveryToken(nn.ModuleList):
    """What `Mixture` computes, with every token seen by every expert; `routed` says which count."""

    def __init__(self, mixture):
        super().__init__(mixture.experts)
        self.router = mixture.router

    def forward(self, hidden):
        weights, chosen = (hidden[0] @ self.router.T).softmax(-1).topk(2)
        total = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            expert.w1.routed = expert.w2.routed = (chosen == number).any(1)
            total = total + (weights * (chosen == number)).sum(1)[:, None] * expert(hidden)
        return total


def every_token(model):
    model = copy.deepcopy(model)
    for layer in model.layers:
        layer.moe = nn.ModuleDict({"experts": EveryToken(layer.moe)})
        layer.moe.forward = layer.moe["experts"].forward
    return model


@pytest.mark.parametrize("kind", ("plain", "repeated"))
def test_a_family_that_nobody_told_us_of(kind):
    """Made of linear maps, biases on some of them; `repeated` has one layer twice, each use a position of its own."""
    model = homemade(kind)
    assert len(find_linear_maps(model)) == 6
    assert max(compare(stages_of(model, models.perturb(model, 1)))) < 1e-8


def test_experts_that_are_modules_see_the_tokens_routed_to_them():
    found = [homemade("mixture"), models.perturb(homemade("mixture"), 1)]
    assert max(compare(stages_of(*found, 32), stages_of(*map(every_token, found), 32))) < 1e-8


def captured(model, row=slice(None), blocks=None):
    """A ragged batch captured, labels the data's own."""
    encoded, _ = pipeline.encode_rows(reference.StageSpec("s", model, models.build_tokenizer(), []), ANSWERS[:6][row])
    batch = pipeline.to_batch([next(document.windows(len(document.ids))) for document in encoded])
    with Capture(model, find_linear_maps(model, None, blocks)) as capture:
        return capture.run(batch)


def gradients(model):
    found = captured(model)
    return {name: found.gradients(name).transpose(1, 2) @ found.activations(name) for name in found.maps}


def row_by_row(model, names):
    """Autograd on the weights, of every row of `captured` alone and unpadded, by the reference."""
    tokenizer, rows = models.build_tokenizer(), []
    for document in ANSWERS[:6]:
        rows.append(reference.window_gradients(model, names, *reference.tokenise(tokenizer, document)))
    return {name: torch.stack([row[name] for row in rows]) for name in names}


def test_what_an_expert_is_given_must_be_its_tokens():
    with pytest.raises(
        UserError, match=r"what layers\.0\.moe\.experts\.\d is given are not tokens of its block's input"
    ):
        captured(homemade("scaled"))


def test_matrices_that_nothing_says_how_to_track_are_refused_by_name():
    model = homemade("matrices")
    with pytest.raises(
        UserError, match=r"layers\.0\.shape is a parameter of many matrices in a layout that is not known"
    ):
        find_linear_maps(model)
    assert len(find_linear_maps(model, ["*.mlp.*"])) == 4


def test_experts_in_a_layout_that_is_not_known_are_refused_by_name():
    ffn = {"ffn_hidden_size": 12, "moe_num_experts": 2, "moe_top_k": 1}
    config = DbrxConfig(
        d_model=8,
        n_heads=2,
        n_layers=1,
        vocab_size=11,
        ffn_config=ffn,
        attn_config={"kv_n_heads": 1, "rope_theta": 1e4},
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        UserError, match=r"^modules: transformer\.blocks\.0\.ffn\.experts\.mlp\.\w+ is a parameter of many"
    ):
        find_linear_maps(model)
    assert len(find_linear_maps(model, ["*.attn.*"])) == 2


BLOCKS = {
    "a fused layout that is not known": (
        homemade,
        "fused",
        r"how layers\.0\.qkv holds .* is not known of a 'homemade'",
    ),
    "no such maps": (homemade, "plain", "no queries, keys or values; leave `blocks` out"),
    "other heads than it says": (families.build, "gpt_neox", r"the 24 outputs of .*\.0\..* are not 3 query and 3 key"),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_blocks_that_are_not_known_are_refused_by_name(case):
    build, kind, message = BLOCKS[case]
    model = build(kind, 0)
    if kind == "gpt_neox":
        model.config.num_attention_heads = 3
    with pytest.raises(UserError, match=f"^blocks: .*{message}"):
        find_linear_maps(model, None, "heads")


@pytest.mark.parametrize("family", ("mixtral", "llama4"))
def test_experts_see_their_tokens_alone_and_nothing_is_left_on_the_model(family):
    model = families.build(family, 0)
    before = [sorted(module.__dict__) for module in model.modules()]
    with families.Exact():
        found = captured(model)
        expected = row_by_row(families.loosened(model), list(found.maps))
    assert before == [sorted(module.__dict__) for module in model.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    tokens = found.batch.input_ids.numel()
    routed = [name for name in found.maps if ".experts." in name]
    widths = [found.vectors(name)[0].shape[:2].numel() for name in routed]
    assert all(any(found.vectors(name)[0].any(-1).flatten()) for name in routed) and sum(widths) < tokens * len(widths)
    for name, wanted in expected.items():
        inputs, outer = found.vectors(name)  # of an expert, of its tokens alone
        torch.testing.assert_close(outer.transpose(1, 2) @ inputs, wanted, rtol=1e-9, atol=1e-10)
        by_token = found.gradients(name).transpose(1, 2) @ found.activations(name)
        torch.testing.assert_close(by_token, wanted, rtol=1e-9, atol=1e-10)
        assert len(found.positions(name)) == int(found.predicts(name).sum())
    seen = sum(len(found.positions(name)) for name in routed if name.endswith("down_proj") and "layers.1" in name)
    chosen = 2 if family == "mixtral" else 1
    assert seen == chosen * int(found.batch.predicts.sum())


def relative_errors(found, wanted):
    assert found.keys() == wanted.keys()
    return {name: float((found[name].double() - wanted[name]).norm() / wanted[name].norm()) for name in wanted}


@pytest.mark.parametrize("family", ("llama", "gpt_neox", "mixtral"))
def test_eager_and_sdpa_attention_and_checkpointing_give_the_same_gradients(family):
    model = families.build(family, 0)
    with families.Exact():
        expected = gradients(model)
        model.set_attn_implementation("sdpa")
        assert max(relative_errors(gradients(model), expected).values()) < 1e-12
        model.gradient_checkpointing_enable()
        model.train()
        assert max(relative_errors(gradients(model), expected).values()) < 1e-12
        assert model.training and model.is_activation_checkpointing


@pytest.mark.parametrize("family", ("llama", "gpt2", "qwen3_moe"))
def test_bfloat16_weights_give_the_gradients_up_to_its_rounding(family):
    model = families.build(family, 0, std=0.1).to(torch.bfloat16)  # routes as it does in float64
    found = captured(model)
    exact = gradients(copy.deepcopy(model).double())
    assert all(vectors.dtype == torch.bfloat16 for name in found.maps for vectors in found.vectors(name))
    products = {n: found.gradients(n).transpose(1, 2) @ found.activations(n) for n in found.maps}
    total = torch.cat([g.flatten() for g in exact.values()])
    difference = torch.cat([(products[name].double() - exact[name]).flatten() for name in exact])
    assert float(difference.norm() / total.norm()) < 0.03


def test_a_tied_head_is_no_map_of_its_own():
    model = families.build("gemma2", 0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any("lm_head" in name for name in find_linear_maps(model))
    with pytest.raises(UserError, match=r"lm_head shares its weight with model\.embed_tokens"):
        find_linear_maps(model, ["lm_head"])


def test_factors_of_blocks_are_those_of_the_rows_of_a_map():
    """Without a fit: a block has its module's inputs and its own rows of the gradients."""
    model = families.build("bloom", 0)
    whole, cut = captured(model), captured(model, blocks="heads")
    name = "transformer.h.1.self_attention.query_key_value"
    assert len([each for each in cut.maps if each.startswith(name)]) == 6 and name not in cut.maps
    for label, rows in {"q.0": (0, 4), "v.1": (20, 24)}.items():
        assert torch.equal(cut.activations(f"{name}.{label}"), whole.activations(name))
        assert torch.equal(cut.gradients(f"{name}.{label}"), whole.gradients(name)[..., slice(*rows)])
