"""What a model would be made of is checked before any work: sound checkpoints pass, and no tensor is made up."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from msif_ray.checkpoint import Checkpoint, check_checkpoint, load_tokenizer
from msif_ray.config import Stage
from msif_ray.errors import UserError

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"


def check(folder: Path, **stage: Any) -> Checkpoint:
    return check_checkpoint(Stage(name="s", model=str(folder), **stage), None, "stages.0")


def save(model: PreTrainedModel, folder: Path) -> Path:
    return models.save(model, models.build_tokenizer(), folder)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_passes(family: str, tmp_path: Path) -> None:
    assert check(save(families.build(family, 0), tmp_path)).maps


@pytest.mark.parametrize("kind", models.KINDS)
@pytest.mark.parametrize("tied", (True, False))
def test_so_do_tied_and_untied_heads_in_several_files(kind: str, tied: bool, tmp_path: Path) -> None:
    model = models.build_model(kind, 0, tied=tied)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / INDEX).exists() and check(tmp_path).maps


def test_so_does_a_tied_head_that_is_stored_twice(tmp_path: Path) -> None:
    save(models.build_model("llama", 0, tied=True), tmp_path)
    change(lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"].clone()})(tmp_path)
    assert check(tmp_path).maps


def test_so_does_a_backbone_saved_on_its_own_whose_head_is_tied(tmp_path: Path) -> None:
    model = models.build_model("gpt2", 0)
    model.base_model.save_pretrained(tmp_path)
    assert "wte.weight" in load_file(tmp_path / MODEL) and check(tmp_path).maps


def test_so_do_buffers_that_transformers_no_longer_has(tmp_path: Path) -> None:
    save(models.build_model("gpt2", 0), tmp_path)
    old = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8),
        "h.0.attn.masked_bias": torch.ones(1),
    }
    change(lambda w: w | old)(tmp_path)
    assert check(tmp_path).maps


@pytest.mark.parametrize("kind", models.KINDS)
def test_so_do_classifiers(kind: str, tmp_path: Path) -> None:
    save(models.classifier(models.build_model(kind, 0), 1), tmp_path)
    assert check(tmp_path, objective="classification").classes


def encoder(kind: str) -> PreTrainedModel:
    sizes = {"vocab_size": len(models.VOCABULARY), "pad_token_id": 3, "cls_token_id": 0, "sep_token_id": 0}
    config = AutoConfig.for_model(kind, **(sizes | families.SIZES | {"dim": 8, "hidden_dim": 12, "n_heads": 2}))
    return models.randomise(AutoModelForSequenceClassification.from_config(config), 0)


@pytest.mark.parametrize("kind", ("bert", "roberta", "distilbert", "deberta-v2", "modernbert"))
def test_so_do_encoders_that_classify(kind: str, tmp_path: Path) -> None:
    save(encoder(kind), tmp_path)
    assert check(tmp_path, objective="classification").classes


@pytest.mark.parametrize("kind", ("bert", "roberta", "distilbert", "mpnet", "xlm-roberta"))
def test_the_context_is_what_the_model_takes(kind: str, tmp_path: Path) -> None:
    """RoBERTa's kind number positions from behind the padding token's on, and so have some fewer."""
    model = encoder(kind)
    context = check(save(model, tmp_path), objective="classification").context
    assert context is not None
    assert model(torch.full((1, context), 5)).logits.isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, context + 1), 5))


def masked(kind: str, **changes: Any) -> PreTrainedModel:
    sizes = {"vocab_size": len(models.VOCABULARY), "pad_token_id": 3, "emb_dim": 8, "n_layers": 1, "n_heads": 2}
    config = AutoConfig.for_model(kind, **(sizes | families.SIZES | changes))
    return models.randomise(AutoModelForCausalLM.from_config(config), 0)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *((kind, {}) for kind in ("bert", "roberta", "electra", "xlm")),
        ("gemma3_text", families.GEMMA | {"use_bidirectional_attention": True}),
        ("llama", {"is_causal": False}),
    ],
)
def test_a_model_that_sees_later_tokens_is_refused(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """It does: its logits at a token change with what comes after it, so that its loss is no log-likelihood."""
    model = masked(kind, **changes)
    one, other = (model(torch.tensor([[5, 6, 7, last]])).logits[0, 0] for last in (8, 9))
    assert not torch.allclose(one, other)
    with pytest.raises(UserError, match=r"^stages\.0\.model: \w+ sees the tokens after the one that it predicts; "):
        check(save(model, tmp_path))


def test_so_does_bert_as_a_decoder(tmp_path: Path) -> None:
    model = masked("bert", is_decoder=True)
    one, other = (model(torch.tensor([[5, 6, 7, last]])).logits[0, :3] for last in (8, 9))
    torch.testing.assert_close(one, other)
    assert check(save(model, tmp_path)).maps


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": len(models.VOCABULARY), "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **sizes))
    with pytest.raises(
        UserError, match=r"^stages\.0\.model: T5ForConditionalGeneration has an encoder and a decoder; only"
    ):
        check(save(model, tmp_path))


SMALL = {"d_model": 8, "n_layers": 1, "n_heads": 2, "n_layer": 1, "n_head": 2, "n_embd": 8, "hidden_size": 8}
CONTEXTS = {
    "mpt": "max_seq_len", "gpt2": "n_positions", "ctrl": "n_positions", "rwkv": "context_length", "bloom": "seq_length"
}  # fmt: skip


@pytest.mark.parametrize("kind", CONTEXTS)
def test_the_context_has_several_names(kind: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": len(models.VOCABULARY), "num_hidden_layers": 2, "dff": 8, CONTEXTS[kind]: 32}
    config = AutoConfig.for_model(kind, **(SMALL | sizes))
    assert check(save(models.randomise(AutoModelForCausalLM.from_config(config), 0), tmp_path)).context == 32


def test_so_does_a_file_that_the_configuration_names(tmp_path: Path) -> None:
    save(models.build_model("llama", 0), tmp_path)
    (tmp_path / MODEL).rename(tmp_path / "weights.safetensors")
    configure(transformers_weights="weights.safetensors")(tmp_path)
    assert check(tmp_path).maps
    assert models.load(tmp_path)


def test_a_file_that_is_not_loaded_is_not_checked(tmp_path: Path) -> None:
    save(models.build_model("llama", 0), tmp_path)
    save_file({"moments": torch.tensor([float("nan")])}, tmp_path / "optimizer.safetensors")
    assert check(tmp_path).maps


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save(models.build_model("llama", 0), tmp_path)
    capfd.readouterr()
    check(tmp_path)
    change(without("lm_head"))(tmp_path)
    with pytest.raises(UserError):
        check(tmp_path)
    assert capfd.readouterr() == ("", "")


Tensors = dict[str, Tensor]


def change(edit: Callable[[Tensors], Tensors]) -> Callable[[Path], object]:
    return lambda folder: save_file(edit(load_file(folder / MODEL)), folder / MODEL, {"format": "pt"})


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def wrapped(prefix: str) -> Callable[[Path], object]:
    return change(lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})


def configure(**changes: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def split(folder: Path) -> list[Path]:
    """The model in several files, and these."""
    model, _ = models.load(folder)
    (folder / MODEL).unlink()
    model.save_pretrained(folder, max_shard_size="8KB")
    return sorted(folder.glob("*.safetensors"))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def index(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        split(folder)
        (folder / INDEX).write_text(json.dumps(edit(json.loads((folder / INDEX).read_text()))))

    return spoil


def first_file_alone(found: dict[str, Any]) -> dict[str, Any]:
    files = found["weight_map"]
    return found | {"weight_map": {name: file for name, file in files.items() if file == min(files.values())}}


def cast(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: each.to(dtype) if "down_proj" in name else each for name, each in tensors.items()}


DOWN = r"model\.layers\.0\.mlp\.down_proj\.weight"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "saved from torch.compile": (
        wrapped("_orig_mod."),
        r"llama has no tensor lm_head\.weight nor 20 others.* at random; it holds _orig_mod\.lm_head\.weight: save "
        r"the model itself, not what `_orig_mod\.` wraps it in",
    ),
    "saved from DDP": (
        wrapped("module."),
        r"llama has no tensor lm_head\.weight .* it holds module\.lm_head\.weight: save",
    ),
    "from both": (wrapped("module._orig_mod."), r"llama has no tensor .* not what `module\._orig_mod\.` wraps it in"),
    "no tensor": (
        change(without("layers.0.mlp.down_proj")),
        rf"llama has no tensor {DOWN}, which would be made up at random; copy or save the whole model again, with",
    ),
    "no layer": (change(without("layers.1.")), r"llama has no tensor model\.layers\.1\.\S+ nor 8 others, which"),
    "no head": (change(without("lm_head")), r"llama has no tensor lm_head\.weight, which would be made up at random"),
    "a layer more": (configure(num_hidden_layers=3), r"llama has no tensor model\.layers\.2\.\S+ nor 8 others"),
    "another shape": (
        change(lambda w: w | {"lm_head.weight": w["lm_head.weight"][:-1].clone()}),
        r"llama: the tensor lm_head\.weight is 52 x 16, and 53 x 16 by config\.json; ",
    ),
    "another name": (
        lambda f: (f / MODEL).rename(f / "weights.safetensors"),
        r"llama has no model\.safetensors or model\.safetensors\.index\.json, .*; rename weights\.safetensors, or",
    ),
    "no file of several": (
        lambda f: split(f)[1].unlink(),
        r"llama has no model-00002-of-\d+\.safetensors, which its model\.safetensors\.index\.json names; copy",
    ),
    "no JSON in the index": (
        lambda f: [split(f), (f / INDEX).write_text("{")],
        r".*index\.json does not say which file holds which tensor; copy or save",
    ),
    "no map in the index": (index(lambda found: {}), r".*index\.json does not say which file holds which tensor"),
    "a list for an index": (index(lambda found: []), r".*index\.json does not say which file holds which tensor"),
    "an empty index": (index(lambda found: {"weight_map": {}}), r".*index\.json does not say which file holds which"),
    "a number in the index": (index(lambda found: {"weight_map": {"a": 1}}), r".*index\.json does not say which file"),
    "a file that the index leaves out": (index(first_file_alone), r"llama has no tensor \S+ nor \d+ others, which"),
    "a file of the index cut": (
        lambda f: cut(split(f)[1]),
        r".*model-00002-of-\d+\.safetensors is not whole safetensors",
    ),
    "float8": (
        change(cast(torch.float8_e4m3fn)),
        rf".*model\.safetensors: the tensor {DOWN} is of float8_e4m3fn; dequantise the model and save it in",
    ),
    "int8": (
        change(cast(torch.int8)),
        rf".*model\.safetensors: the tensor {DOWN} is of I8, as quantised weights are; dequantise the model",
    ),
    "a number for a file's name": (
        configure(transformers_weights=3),
        r"llama: transformers_weights of its config\.json is 3, not the name of a file",
    ),
    "text for a number": (
        configure(num_hidden_layers="two"),
        r"llama is not a causal language model that loads: .*two",
    ),
    "attention at random": (
        configure(attention_type="block_sparse"),
        r"llama has attention_type block_sparse, .*; write original_full in its config\.json",
    ),
    "heads that do not divide": (configure(num_attention_heads=3), r"llama is not a causal .*not a multiple"),
    "code of its own": (
        configure(model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}),
        r"llama is not a causal language model that loads: it brings code of its own, which is not run here; name one",
    ),
    "no heads": (configure(num_attention_heads=0), r"llama is not a causal .*by zero"),
    **{
        f"quantised: {said}": (
            configure(quantization_config=config),
            rf"llama holds quantised weights \({said}\); dequantise the model, and save it without the "
            "quantization_config of its config",
        )
        for said, config in {
            "gptq": {"quant_method": "gptq", "bits": 4},
            "awq": {"quant_method": "awq", "bits": 4},
            "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "no named method": {"load_in_8bit": True},
        }.items()
    },
}


RANGES = [
    ("float32", -1e39, False),
    ("float32", 3.4e38, True),
    ("bfloat16", 3.4e38, False),  # rounded up
    ("bfloat16", 3.38e38, True),
    ("float64", 1e300, True),
]


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_one_line(case: str, tmp_path: Path) -> None:
    spoil, message = FAULTS[case]
    folder = save(models.build_model("llama", 0), tmp_path / "llama")
    spoil(folder)
    with pytest.raises(UserError, match=rf"^stages\.0\.model: .*{message}") as error:
        check(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("dtype", "number", "fits"), RANGES)
def test_a_number_beyond_the_run_s_type_is_refused(dtype: str, number: float, fits: bool, tmp_path: Path) -> None:
    """It would be infinite as soon as the model is loaded, and every document's loss with it."""
    model = models.build_model("llama", 0)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = number
    folder, stage = save(model, tmp_path / "llama"), Stage(name="s", model=str(tmp_path / "llama"))
    assert check(folder).maps
    if fits:
        assert check_checkpoint(stage, None, "stages.0", dtype=dtype).maps
        return
    with pytest.raises(
        UserError, match=rf"^stages\.0\.model: .*{DOWN} holds a number that {dtype} has not, .*float64$"
    ):
        check_checkpoint(stage, None, "stages.0", dtype=dtype)


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    """It would be in run.json as what was scored."""
    save(models.build_model("llama", 0), tmp_path)
    with pytest.raises(UserError, match=rf"^stages\.0\.revision: {tmp_path} is not of the hub and has no revisions; "):
        check(tmp_path, revision="main")


def multimodal() -> PreTrainedModel:
    """Gemma 3 as it is on the hub from four billion parameters on: a language model beside a vision tower."""
    text = families.GEMMA | {"vocab_size": len(models.VOCABULARY), "pad_token_id": 3, "eos_token_id": 1}
    vision = families.SIZES | {"image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return models.randomise(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), 0)


def test_what_no_text_enters_is_not_tracked(tmp_path: Path) -> None:
    save(multimodal(), tmp_path)
    found = check(tmp_path)
    assert found.context == models.CONTEXT and found.vocabulary == len(models.VOCABULARY)
    assert len(found.maps) == 14 and all(name.startswith("model.language_model.layers.") for name in found.maps)
    with pytest.raises(UserError, match=r"^modules: '\*\.vision_tower\.\*' matches no linear map"):
        check_checkpoint(Stage(name="s", model=str(tmp_path)), ["*.vision_tower.*"], "stages.0")


def test_modules_that_a_model_has_not_say_which_model(tmp_path: Path) -> None:
    save(models.build_model("llama", 0), tmp_path)
    with pytest.raises(UserError, match=r"^modules: '\*\.x' matches no linear map; .* \(the model of stages\.0\)$"):
        check_checkpoint(Stage(name="s", model=str(tmp_path)), ["*.x"], "stages.0")


@pytest.mark.parametrize("part", ("experts.1.w1.weight", "experts.1.w3.weight", "block_sparse_moe"))
def test_an_expert_that_is_missing_is_refused(part: str, tmp_path: Path) -> None:
    save(families.build("mixtral", 0), tmp_path)
    whole = load_file(tmp_path / MODEL)
    change(without(part))(tmp_path)
    assert len(load_file(tmp_path / MODEL)) < len(whole)
    with pytest.raises(UserError, match=r"^stages\.0\.model: .*(experts|MixtralForCausalLM)") as error:
        check(tmp_path)
    assert "\n" not in str(error.value)


def test_so_is_a_tokenizer_with_code_of_its_own(tmp_path: Path) -> None:
    folder = save(models.build_model("llama", 0), tmp_path / "llama")
    path = folder / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    with pytest.raises(
        UserError, match=r"^tokenizer: no tokenizer loads from .*llama: it brings code of its own, which"
    ):
        load_tokenizer(str(folder), "tokenizer")


def test_a_tokenizer_of_a_newer_library_is_one_line(tmp_path: Path) -> None:
    models.build_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": {"type": "Future", "vocab": {}}}))
    with pytest.raises(UserError, match=r"^stages\.0\.tokenizer: no tokenizer loads from .*ModelUntagged") as error:
        load_tokenizer(str(tmp_path), "stages.0.tokenizer")
    assert "\n" not in str(error.value)
