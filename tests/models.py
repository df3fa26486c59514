"""Tiny random language models, tokenizers and documents for the tests.

The weights are much larger than the usual initialisation (standard deviation 0.3, biases and norm weights
random too), so that attention, biases and every gradient matter to the numbers that are compared. All values
are exactly representable in float32: a model saved in either precision is the same model.

Only architectures with `nn.LayerNorm` are exact in float64. `llama` computes its norms in float32 whatever
the dtype of the model; `exact_norms` lifts that for as long as a test in the same process needs it. Eager
attention takes its softmax in float32, hence "sdpa" everywhere.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StableLmConfig,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

WORDS = (
    "the", "a", "of", "in", "is", "was", "to", "river",
    "city", "people", "code", "name", "king", "house", "green", "old",
    "light", "stone", "winter", "market", "north", "sea", "Ulm", "Oran",
)  # fmt: skip
UNKNOWN, EOS, BOS, PAD = "<unk>", "<eos>", "<bos>", "<pad>"
VOCABULARY = (UNKNOWN, EOS, BOS, PAD, ".", *WORDS, *(f"Ġ{word}" for word in WORDS))
KINDS = ("gpt_neox", "gpt2", "llama", "stablelm", "opt")
CONTEXT = 64


def build_tokenizer(bos: bool = False, pad: bool = False, eos: bool = True) -> PreTrainedTokenizerFast:
    """Word-level tokenizer over `VOCABULARY` in which a word keeps its leading space, as GPT-2's does.

    `bos`: declares the BOS token and adds it in front by default. `pad`, `eos`: whether those are declared.
    The vocabulary is the same in every variant.
    """
    backend = Tokenizer(WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    if bos:
        backend.post_processor = TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, VOCABULARY.index(BOS))]
        )
    special = {"unk_token": UNKNOWN}
    special |= {"eos_token": EOS} if eos else {}
    special |= {"bos_token": BOS} if bos else {}
    special |= {"pad_token": PAD} if pad else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def build_config(
    kind: str, vocab: int, hidden: int, intermediate: int, layers: int, heads: int, tied: bool | None
) -> PretrainedConfig:
    """Configuration of a tiny model; `tied`: share embedding and head (None: only gpt2 and opt do)."""
    tied = kind in ("gpt2", "opt") if tied is None else tied
    shared = {
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "bos_token_id": VOCABULARY.index(BOS),
        "eos_token_id": VOCABULARY.index(EOS),
    }
    usual = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": CONTEXT,
    }
    if kind == "gpt_neox":
        rotary = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
        return GPTNeoXConfig(**shared, **usual, rope_parameters=rotary)
    if kind in ("llama", "stablelm"):
        config = {"llama": LlamaConfig, "stablelm": StableLmConfig}[kind]
        return config(**shared, **usual, num_key_value_heads=1)
    if kind == "gpt2":
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2Config(
            **shared,
            **dropout,
            n_embd=hidden,
            n_inner=intermediate,
            n_layer=layers,
            n_head=heads,
            n_positions=CONTEXT,
        )
    if kind == "opt":
        return OPTConfig(
            **shared,
            hidden_size=hidden,
            word_embed_proj_dim=hidden,
            ffn_dim=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=CONTEXT,
            pad_token_id=VOCABULARY.index(PAD),
            dropout=0.0,
            activation_function="gelu",
        )
    raise ValueError(f"unknown kind of model {kind!r}; known: {', '.join(KINDS)}")


def build_model(
    kind: str,
    seed: int,
    vocab: int = len(VOCABULARY),
    hidden: int = 16,
    intermediate: int = 24,
    layers: int = 2,
    heads: int = 2,
    std: float = 0.3,
    tied: bool | None = None,
) -> PreTrainedModel:
    """A random causal language model of the kind, in float64 and eval mode, sdpa attention, context 64.

    `gpt_neox`: biases, fused query/key/value, rotary. `gpt2`: Conv1D, biases, tied head. `opt`: separate
    query/key/value with biases, tied head. `llama` and `stablelm`: no bias, one key/value head for two query
    heads, gated MLP, rotary; `llama` with norms in float32.
    """
    config = build_config(kind, vocab, hidden, intermediate, layers, heads, tied)
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return randomise(model, seed, std)


def randomise(model: PreTrainedModel, seed: int, std: float = 0.3) -> PreTrainedModel:
    """The model, in float64 and eval mode, with random weights of this deviation, norms' around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = std * torch.randn(parameter.shape, generator=generator)
            norm_weight = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + noise if norm_weight else noise)
    return model.double().eval()


def perturb(model: PreTrainedModel, seed: int, scale: float = 0.1) -> PreTrainedModel:
    """A "fine-tuned" copy: parameters moved by `scale` x their standard deviation x standard normal."""
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            step = scale * parameter.std() * torch.randn(parameter.shape, generator=generator)
            parameter.copy_((parameter + step).float())
    return tuned


def classifier(
    backbone: PreTrainedModel, seed: int, labels: int = 3, attention: str = "sdpa", **config: object
) -> PreTrainedModel:
    """A model with the backbone's weights and a random classification head, `config` changing its configuration."""
    own = copy.deepcopy(backbone.config)
    own.num_labels = labels
    for name, value in config.items():
        setattr(own, name, value)
    with torch.random.fork_rng():
        made = AutoModelForSequenceClassification.from_config(own, attn_implementation=attention)
    made = randomise(made, seed)
    made.base_model.load_state_dict(backbone.base_model.state_dict())
    return made


def random_texts(seed: int, count: int, words: tuple[int, int] = (1, 20), labels: int = 3) -> list[dict[str, object]]:
    """Texts of ragged length with a class's number: {"id", "text", "label"}."""
    rng = random.Random(seed)
    texts = [random_text(rng, rng.randint(*words)) for _ in range(count)]
    return [{"id": f"text-{seed}-{i}", "text": text, "label": rng.randrange(labels)} for i, text in enumerate(texts)]


def random_pairs(seed: int, count: int, words: tuple[int, int] = (2, 12)) -> list[dict[str, str]]:
    """Prompts with two completions of ragged length, {"id", "prompt", "chosen", "rejected"}; a third begin alike."""
    rng = random.Random(seed)
    pairs = []
    for i in range(count):
        prompt, *both = (random_text(rng, rng.randint(*words)) for _ in range(3))
        alike = " the old" if i % 3 == 0 else ""
        pairs.append(
            {"id": f"pair-{seed}-{i}", "prompt": prompt}
            | {what: f"{alike} {text}" for what, text in zip(("chosen", "rejected"), both, strict=True)}
        )
    return pairs


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    dtype: torch.dtype = torch.float64,
) -> Path:
    """Write model (safetensors, in `dtype`) and tokenizer so that `from_pretrained(folder)` loads them."""
    folder = Path(folder)
    copy.deepcopy(model).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_pair(
    folder: str | Path,
    kind: str,
    seed: int,
    scale: float = 0.1,
    dtype: torch.dtype = torch.float64,
    stages: int = 2,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **options: int,
) -> list[Path]:
    """A model and its successive "fine-tuned" versions, saved to folder/stage0, folder/stage1, ..."""
    tokenizer = tokenizer or build_tokenizer()
    model = build_model(kind, seed, **options)
    folders = []
    for stage in range(stages):
        model = perturb(model, seed + stage, scale) if stage else model
        folders.append(save(model, tokenizer, Path(folder) / f"stage{stage}", dtype))
    return folders


def load(folder: str | Path, dtype: torch.dtype = torch.float64) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """What `save` wrote, in `dtype`, eval mode, sdpa attention."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@contextmanager
def exact_norms() -> Iterator[None]:
    """Meanwhile llama's RMSNorm computes in its input's dtype instead of float32 (in this process only)."""
    forward = LlamaRMSNorm.forward

    def exact(self: LlamaRMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)

    LlamaRMSNorm.forward = exact
    try:
        yield
    finally:
        LlamaRMSNorm.forward = forward


def random_text(rng: random.Random, words: int) -> str:
    """`words` random words of `WORDS`, ended by a full stop: words + 1 tokens."""
    return " ".join(rng.choices(WORDS, k=words)) + "."


def random_documents(
    seed: int, count: int, words: tuple[int, int] = (3, 20), completions: bool = False, prefix: str = "doc"
) -> list[dict[str, str]]:
    """Documents of ragged length (`words`: fewest and most), {"id", "text"}, or with `completions`
    {"id", "prompt", "completion"} in which both parts have a random number of words and the completion a
    leading space."""
    rng = random.Random(seed)
    documents = []
    for i in range(count):
        text = random_text(rng, rng.randint(*words))
        if completions:
            answer = " " + random_text(rng, rng.randint(*words))
            documents.append({"id": f"{prefix}-{i}", "prompt": text, "completion": answer})
        else:
            documents.append({"id": f"{prefix}-{i}", "text": text})
    return documents
