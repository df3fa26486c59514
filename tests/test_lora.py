"""Adapters merged into their base equal peft's own merged models, and what cannot be merged is refused by name."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import models
import object_storage
import pytest
import torch
from adapters import MAPS, adapted, save_adapter
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_preflight import describe, folder, pair
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from msif_ray import fetch, layout
from msif_ray.config import parse_run
from msif_ray.errors import UserError
from msif_ray.lora import CONFIG, WEIGHTS, merge
from msif_ray.preflight import Resolved, check
from msif_ray.record import keep_record
from msif_ray.store import read_json

__all__ = ["folder", "pair"]  # fixtures


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MSIF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fused query, key and value": ("gpt_neox", {}),
    "transposed weights": ("gpt2", {"fan_in_fan_out": True}),
    "rank-stabilised": ("llama", {"use_rslora": True}),
    "ranks and alphas of single maps": (
        "llama",
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 7, "q_proj": 9}},
    ),
    "DoRA": ("llama", {"use_dora": True}),
    "DoRA of transposed weights": ("gpt2", {"use_dora": True, "fan_in_fan_out": True}),
    "trained biases": ("gpt_neox", {"bias": "all"}),
    "biases of the adapted maps": ("gpt2", {"bias": "lora_only", "fan_in_fan_out": True}),
    "whole modules": ("llama", {"modules_to_save": ["embed_tokens", "lm_head", "gate_proj"]}),
    "embeddings of low rank": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
}


def merged_as_by_peft(model: PeftModel, base: Path, adapter: Path, target: Path) -> int:
    """How many tensors of the base the merged model has changed. It equals peft's own, which this makes of `model`."""
    target.mkdir()
    merge(adapter, base, base, target)
    found, before = (models.load(folder)[0].state_dict() for folder in (target, base))
    expected = model.merge_and_unload().state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-12)
    return sum(not torch.equal(tensor, before[name]) for name, tensor in found.items())


@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_is_that_of_peft(tmp_path: Path, case: str) -> None:
    kind, options = CASES[case]
    base = models.build_model(kind, 1)
    folder = models.save(base, models.build_tokenizer(), tmp_path / "base")
    model = adapted(base, str(folder), **{"target_modules": MAPS[kind]} | options)
    model.save_pretrained(tmp_path / "adapter")
    assert merged_as_by_peft(model, folder, tmp_path / "adapter", tmp_path / "merged") >= 3
    assert len(models.load(tmp_path / "merged")[1]) == len(models.VOCABULARY)


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("saved", [["final_layer_norm"], ["mlp"], ["dense_4h_to_h", "embed_out"]])
def test_biases_of_modules_that_an_adapter_holds_whole(tmp_path: Path, bias: str, saved: list[str]) -> None:
    """peft saves them twice, and the base's: of a module inside another one even with the adapter's name."""
    base = models.build_model("gpt_neox", 1)
    folder = models.save(base, models.build_tokenizer(), tmp_path / "base")
    model = adapted(base, str(folder), target_modules=["dense"], bias=bias, modules_to_save=saved)
    model.save_pretrained(tmp_path)
    named = PeftModel.from_pretrained(base, tmp_path, adapter_name="named")
    named.save_pretrained(tmp_path)
    for adapter, own in ((tmp_path, model), (tmp_path / "named", named)):
        twice = [name for name in load_file(adapter / WEIGHTS) if ".modules_to_save." in name]
        assert bool(twice) == (bias == "all")
        assert merged_as_by_peft(own, folder, adapter, adapter / "merged") >= 3


def test_a_base_of_several_files_in_bfloat16_keeps_small_changes(tmp_path: Path) -> None:
    base = models.build_model("llama", 1).to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base", max_shard_size="4KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    model = adapted(base.float(), str(tmp_path / "base"), target_modules=MAPS["llama"], lora_alpha=0.001)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    merge(tmp_path / "adapter", tmp_path / "base", tmp_path / "base", tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for name, tensor in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("named", "saved"), [(False, ["embed_tokens", "lm_head"]), (True, ["embed_tokens", "lm_head"]), (True, None)]
)
def test_embeddings_of_added_tokens_make_a_larger_vocabulary(
    tmp_path: Path, named: bool, saved: list[str] | None
) -> None:
    """Where it finds the base, peft sees that it has grown, and saves embedding and head with all that is in them."""
    base = models.build_model("llama", 1)
    folder = models.save(base, models.build_tokenizer(), tmp_path / "base")
    grown, size = copy.deepcopy(base), len(models.VOCABULARY) + 2
    grown.resize_token_embeddings(size, mean_resizing=False)
    model = adapted(grown, str(folder) if named else "", target_modules=["q_proj"], modules_to_save=saved)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer = models.build_tokenizer()
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    merged_as_by_peft(model, folder, tmp_path / "adapter", tmp_path / "merged")
    found, own = models.load(tmp_path / "merged")
    assert found.config.vocab_size == size == len(own)


def with_adapter(folder: Path, adapter: Path, **stage: Any) -> dict[str, Any]:
    description = describe(folder)
    description["stages"][1] |= {"model": str(adapter)} | stage
    return description


def resolve(description: dict[str, Any]) -> Resolved:
    return check(parse_run(description))


def test_a_stage_that_is_an_adapter_is_its_merged_model(folder: Path, cache: Path) -> None:
    description = with_adapter(folder, save_adapter(folder, folder / "stage0"))
    resolved = resolve(description)
    base, tuned = resolved.stages
    assert tuned.maps == base.maps and tuned.model_hash != base.model_hash
    assert Path(tuned.model_path).parent == cache and tuned.tokenizer_path == tuned.model_path
    merged = AutoModelForCausalLM.from_pretrained(fetch.local_model(tuned.source), dtype=torch.float64)
    model, _ = models.load(folder / "stage0")
    expected = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)
    keep_record(resolved, lambda line: None)
    record = read_json(layout.run_record(description["run_dir"]))
    assert record["identity"]["models"]["tune"]["adapter"]["base"] == "pre"
    assert "full fine-tuning" in record["meaning"]["adapter"]


def test_every_node_makes_the_same_of_it_once(
    folder: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    description = with_adapter(folder, save_adapter(folder, folder / "stage0"))
    first = resolve(description).stages[1]
    written = (Path(first.model_path) / "model.safetensors").stat().st_mtime_ns
    assert resolve(description).stages[1] == first
    assert (Path(first.model_path) / "model.safetensors").stat().st_mtime_ns == written
    monkeypatch.setenv("MSIF_CACHE", str(folder / "another node"))
    again = Path(fetch.local_model(first.source))
    assert again.parent == folder / "another node" and not list(again.parent.glob("*.tmp"))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (again / name).read_bytes() == (Path(first.model_path) / name).read_bytes()
    save_adapter(folder, folder / "stage0", seed=5)  # another state of the same folder
    assert resolve(description).stages[1].model_hash != first.model_hash


def test_a_base_and_an_adapter_in_object_storage_are_merged_on_each_node(
    folder: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = object_storage.put_folder(folder / "stage0", bucket, "base")
    adapter = save_adapter(folder, folder / "stage0")
    edit(adapter, base_model_name_or_path=url)
    description = with_adapter(folder, adapter)
    description["stages"][0]["model"] = url
    description["stages"][1]["model"] = object_storage.put_folder(adapter, bucket, "adapter")
    tuned = resolve(description).stages[1]
    monkeypatch.setenv("MSIF_CACHE", str(folder / "another node"))
    again = Path(fetch.local_model(tuned.source))
    assert (again / "model.safetensors").read_bytes() == (Path(tuned.model_path) / "model.safetensors").read_bytes()
    assert fetch.local_tokenizer(tuned.tokenizer_source) == str(again)


def test_an_adapter_on_an_adapter(folder: Path) -> None:
    save_adapter(folder, folder / "stage0")
    description = with_adapter(folder, folder / "adapter")
    second = save_adapter(folder, folder / "stage0", "second", seed=4)  # peft names the first base for both
    description["stages"].append({"name": "more", "model": str(second), "response": {"kind": "identity"}})
    with pytest.raises(
        UserError, match=r"^stages\.2\.model: the adapter .*second was trained on .*stage0, .*before is"
    ):
        resolve(description)
    model, _ = models.load(folder / "stage0")
    model = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
    expected = PeftModel.from_pretrained(model, second).merge_and_unload().state_dict()
    description["stages"][2]["base"] = "tune"
    merged = AutoModelForCausalLM.from_pretrained(resolve(description).stages[2].model_path, dtype=torch.float64)
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


def edit(adapter: Path, **changes: Any) -> None:
    path = adapter / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def retensor(adapter: Path, **changes: Any) -> None:
    """With other tensors: what a value is not given for is left out, by the end of its name."""
    tensors = load_file(adapter / WEIGHTS)
    for end, value in changes.items():
        name = next((name for name in tensors if name.endswith(end.replace("__", "."))), f"base_model.model.{end}")
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, adapter / WEIGHTS)


MERGE = r"; merge it with peft \(merge_and_unload\) and name the saved model$"
REFUSED: dict[str, tuple[Any, str]] = {
    "another kind": (
        lambda a: edit(a, peft_type="IA3"),
        r"an adapter of kind IA3 is not merged here, only LORA" + MERGE,
    ),
    "DoRA without its magnitudes": (
        lambda a: edit(a, use_dora=True),
        r"gpt_neox\.layers\.0\.attention\.query_key_value is not a map with a magnitude as DoRA has it" + MERGE,
    ),
    "another variant": (lambda a: edit(a, use_qalora=True), r"an adapter with use_qalora is not merged here" + MERGE),
    "single tokens": (lambda a: edit(a, trainable_token_indices=[3]), "an adapter with trainable_token_indices is not"),
    "an option not known": (lambda a: edit(a, use_more=1), r"an adapter with use_more is not merged here" + MERGE),
    "a base that was changed": (lambda a: edit(a, init_lora_weights="pissa"), "init_lora_weights 'pissa' has changed"),
    "no JSON": (lambda a: (a / CONFIG).write_text("{"), "not the configuration of a PEFT adapter"),
    "pickled": (
        lambda a: (a / WEIGHTS).rename(a / "adapter_model.bin"),
        r"there is no adapter_model\.safetensors beside it; save the adapter with safe_serialization",
    ),
    "cut": (lambda a: (a / WEIGHTS).write_bytes((a / WEIGHTS).read_bytes()[:-9]), "is not whole safetensors"),
    "one matrix": (
        lambda a: retensor(a, **{"layers.0.mlp.dense_4h_to_h.lora_A.weight": None}),
        r"gpt_neox\.layers\.0\.mlp\.dense_4h_to_h has not both of lora_A and lora_B",
    ),
    "a magnitude": (
        lambda a: retensor(a, **{"gpt_neox.x.lora_magnitude_vector": torch.ones(3)}),
        r"gpt_neox\.x is not a map with a magnitude as DoRA has it" + MERGE,
    ),
    "another base": (
        lambda a: retensor(a, **{"layers.0.mlp.dense_4h_to_h.lora_A.weight": torch.ones(3, 7)}),
        r"layers\.0\.mlp\.dense_4h_to_h\.weight is changed by 16 x 7, and 16 x 24 in the base: another base\?",
    ),
    "a bias of low rank": (
        lambda a: retensor(a, **{"gpt_neox.x.lora_B.bias": torch.ones(3)}),
        r"the tensor base_model\.model\.gpt_neox\.x\.lora_B\.bias is not one of plain LoRA" + MERGE,
    ),
    "no such map": (
        lambda a: retensor(a, **{"gpt_neox.y.weight": torch.ones(3)}),
        r"gpt_neox\.y\.weight is not among the base's tensors" + MERGE,
    ),
    "two states of a module": (
        lambda a: retensor(a, **{f"gpt_neox.z.{of}bias": torch.ones(3 + len(of)) for of in ("", "modules_to_save.")}),
        r"gpt_neox\.z\.modules_to_save\.bias is not as gpt_neox\.z itself has it; save the adapter again",
    ),
    "a module that another adapter holds whole": (
        lambda a: retensor(a, **{"gpt_neox.z.original_module.bias": torch.ones(3)}),
        r"gpt_neox\.z\.original_module\.bias is of no module that the adapter holds whole" + MERGE,
    ),
    "not a number": (
        lambda a: retensor(a, **{"layers.0.mlp.dense_4h_to_h.lora_A.weight": torch.full((3, 24), torch.nan)}),
        r"the tensor .*dense_4h_to_h\.lora_A\.weight holds a number that is not finite",
    ),
}


def test_weights_and_an_adapter_in_one_folder(folder: Path) -> None:
    """transformers loads the one with the other where peft is installed, and without it where it is not."""
    both = save_adapter(folder, folder / "stage0")
    shutil.copyfile(folder / "stage1" / "model.safetensors", both / "model.safetensors")
    shutil.copyfile(folder / "stage1" / "config.json", both / "config.json")
    said = r"stages\.1\.model: .*adapter holds adapter_config\.json beside a model's weights; put what is meant into"
    with pytest.raises(UserError, match=f"^{said} a folder of its own$"):
        resolve(with_adapter(folder, both))


def test_an_adapter_with_a_name_is_in_a_folder_of_this_name(folder: Path) -> None:
    save_adapter(folder, folder / "stage0")
    named = PeftModel.from_pretrained(models.load(folder / "stage0")[0], folder / "adapter", adapter_name="mine")
    named.save_pretrained(folder / "named")
    said = r"stages\.1\.model: .*named has no config\.json; name the adapter in its folder mine"
    with pytest.raises(UserError, match=f"^{said}$"):
        resolve(with_adapter(folder, folder / "named"))
    assert resolve(with_adapter(folder, folder / "named" / "mine")).stages[1].adapter is not None


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_merged_exactly_is_refused_by_name(folder: Path, cache: Path, case: str) -> None:
    spoil, message = REFUSED[case]
    adapter = save_adapter(folder, folder / "stage0")
    spoil(adapter)
    with pytest.raises(UserError, match=rf"^stages\.1\.model: .*{message}") as error:
        resolve(with_adapter(folder, adapter))
    assert "\n" not in str(error.value) and not list(cache.glob("*.tmp"))


BOTH_ENDS = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}


@pytest.mark.parametrize("options", [{"target_modules": ["embed_tokens"]}, BOTH_ENDS])
def test_an_embedding_that_the_head_shares_is_not_changed(tmp_path: Path, options: dict[str, Any]) -> None:
    """peft makes two tensors of one."""
    base = models.build_model("llama", 1, tied=True)
    folder = models.save(base, models.build_tokenizer(), tmp_path / "base")
    adapted(base, "", **options).save_pretrained(tmp_path / "adapter")
    said = r"(embed_tokens|lm_head)\.weight is changed by the adapter and shared by embedding and head in the base"
    with pytest.raises(UserError, match=said + MERGE):
        merge(tmp_path / "adapter", folder, folder, tmp_path)


@pytest.mark.parametrize(("kind", "embedding"), [("llama", "embed_tokens"), ("gpt2", "wte")])
def test_a_classifier_with_added_tokens(tmp_path: Path, kind: str, embedding: str) -> None:
    """Its embedding is shared with no head, and none has to grow with it."""
    base = models.classifier(models.build_model(kind, 1), 2)
    folder = models.save(base, models.build_tokenizer(), tmp_path / "base")
    grown, size = copy.deepcopy(base), len(models.VOCABULARY) + 2
    grown.resize_token_embeddings(size, mean_resizing=False)
    options = {"target_modules": MAPS[kind], "modules_to_save": [embedding], "task_type": "SEQ_CLS"}
    model = adapted(grown, str(folder), **options)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    merge(tmp_path / "adapter", folder, folder, tmp_path / "merged")
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    assert found.config.vocab_size == size
    expected = model.merge_and_unload().state_dict()
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-12)


def test_a_head_that_has_not_grown_with_its_embedding(tmp_path: Path) -> None:
    """peft does not save it where the embedding is changed by low rank."""
    base = models.build_model("llama", 1)
    folder = models.save(base, models.build_tokenizer(), tmp_path / "base")
    base.resize_token_embeddings(len(models.VOCABULARY) + 2, mean_resizing=False)
    adapted(base, str(folder), target_modules=["embed_tokens"]).save_pretrained(tmp_path / "adapter")
    said = r"different numbers of tokens: lm_head\.weight \d+ and model\.embed_tokens\.weight \d+"
    (tmp_path / "merged").mkdir()
    with pytest.raises(UserError, match=said + MERGE):
        merge(tmp_path / "adapter", folder, folder, tmp_path / "merged")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["adapter"], r"stages\.0\.model: .*adapter is an adapter, and no stage before it has its base; add that as"),
        (
            ["copy", "adapter"],
            r"stages\.1\.model: the adapter .* was trained on .*stage0, and .*; say `base: s0`|.*`base: s0`",
        ),
        ([("stage0", "s0")], r"run description: stages\.0\.base: there is no earlier stage 's0'"),
        (["stage0", ("stage1", "s0")], r"stages\.1\.base: .*stage1 is a model with its own weights and no adapter"),
    ],
)
def test_which_base_is_meant_is_asked(folder: Path, stages: list[Any], message: str) -> None:
    save_adapter(folder, folder / "stage0")
    shutil.copytree(folder / "stage0", folder / "copy")
    description, answer = describe(folder), {"kind": "identity"}
    pairs = [(stage, None) if isinstance(stage, str) else stage for stage in stages]
    description["stages"] = [
        describe(folder)["stages"][0]
        | {"name": f"s{i}", "model": str(folder / model), "base": base, "response": answer}
        for i, (model, base) in enumerate(pairs)
    ]
    description["score"] = [{"stage": "s0"}]
    with pytest.raises(UserError, match=f"^{message}"):
        resolve(description)
