"""A stage's model as it is on disk: found, read once for its hash and its faults, never executed."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from msif_ray.adapters import find_base, merge_into
from msif_ray.config import Stage
from msif_ray.corpus.switches import Switches, switches_of
from msif_ray.errors import UserError, one_line
from msif_ray.fetch import HUB, MODEL_FILES, TOKENIZER_FILES, TOKENIZER_IDENTITY, folder_revision, obtain
from msif_ray.influence.blocks import Blocks
from msif_ray.influence.modules import find_linear_maps
from msif_ray.loading import auto_class
from msif_ray.lora import CONFIG, WEIGHTS, is_adapter, read_config
from msif_ray.weights import check_complete, finite_tensors, weight_files

HASH_BYTES = 2**22
# What configurations call the tokens of a context; MPT's ALiBi has no more positions either.
CONTEXT = ("max_position_embeddings", "max_seq_len", "max_target_positions", "n_positions", "n_ctx", "seq_length")


@dataclass(frozen=True)
class Checkpoint:
    """A checked model and its tokenizer: their local folders, the tokens of its context and of its vocabulary, and the
    shapes of the tracked maps `(out, columns)`.

    Another node finds the same files by `source` and `tokenizer_source` (`fetch.local_model`, `local_tokenizer`).
    `model_hash` is that of the weights; `files` has the hash of each smaller file that a score depends on. `classes`
    are the names of a classifier's, by number; `switches` are lengths after which the model computes otherwise. Where
    the model is an adapter, all this is of the merged model, and `adapter` says what was merged into what.
    """

    name: str
    model_path: str
    source: str
    tokenizer_path: str
    tokenizer_source: str
    model_hash: str
    files: dict[str, str]
    revision: str | None
    context: int | None
    vocabulary: int
    maps: dict[str, tuple[int, int]]
    classes: tuple[str, ...] = ()
    adapter: dict[str, str] | None = None
    switches: Switches = ()


def check_checkpoint(
    stage: Stage,
    modules: list[str] | None,
    key: str,
    blocks: Blocks | None = None,
    earlier: Sequence[Checkpoint] = (),
    dtype: str | None = None,
) -> Checkpoint:
    """Finds and checks a stage's model, and finds its tokenizer. An adapter is merged into the model of one of the
    `earlier` stages first.

    Raises UserError, naming the key, file or tensor, for a model that is not there, has no safetensors or not all of
    its tensors, is of an unknown kind or quantised, or holds a number that is not finite, in the run's `dtype` too.
    """
    folder, source = _obtain(stage.model, stage.revision, MODEL_FILES, f"{key}.model")
    if stage.revision is not None and not source.startswith(HUB):
        raise UserError(f"{key}.revision: {stage.model} is not of the hub and has no revisions; leave it out")
    revision, adapter = stage.revision or folder_revision(folder), None
    if is_adapter(folder):
        folder, source, adapter = _merge(stage, folder, source, earlier, key)
    elif (folder / CONFIG).is_file():  # where peft is installed, and only there, transformers adds it to the weights
        raise UserError(
            f"{key}.model: {folder} holds {CONFIG} beside a model's weights; put what is meant into a folder of its own"
        )
    elif stage.base is not None:
        raise UserError(f"{key}.base: {folder} is a model with its own weights and no adapter; leave `base` out")
    files = _weight_files(folder, key)
    config, model = _outline(folder, key, _classifies(stage))
    maps = _maps(model, modules, blocks, key)
    _check_weights(model, folder, key, dtype)
    tokenizer, tokenizer_source = folder, source
    if stage.tokenizer is not None:
        tokenizer, tokenizer_source = _obtain(stage.tokenizer, None, TOKENIZER_FILES, f"{key}.tokenizer")
    return Checkpoint(
        name=stage.name,
        model_path=str(folder),
        source=source,
        tokenizer_path=str(tokenizer),
        tokenizer_source=tokenizer_source,
        model_hash=_sha256(files),
        files=_small_files(folder, tokenizer),
        revision=revision,
        context=_context(config, model),
        vocabulary=model.get_input_embeddings().weight.shape[0],
        maps=maps,
        classes=_classes(config) if _classifies(stage) else (),
        adapter=adapter,
        switches=switches_of(config),
    )


def _weight_files(folder: Path, key: str) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").exists():
        inside = sorted(folder.glob(f"*/{CONFIG}"))  # where peft saves an adapter that has a name
        meant = f"the adapter in its folder {inside[0].parent.name}" if inside else "a folder saved by save_pretrained"
        raise UserError(f"{key}.model: {folder} has no config.json; name {meant}")
    if not files:
        raise UserError(f"{key}.model: {folder} has no .safetensors file; save the model with safe_serialization")
    return files


def _maps(model: Any, modules: list[str] | None, blocks: Blocks | None, key: str) -> dict[str, tuple[int, int]]:
    try:
        return {name: found.shape for name, found in find_linear_maps(model, modules, blocks).items()}
    except UserError as error:  # it names `modules` or `blocks`, which are of all stages
        raise UserError(f"{error} (the model of {key})") from None


def _obtain(name: str, revision: str | None, patterns: Sequence[str], key: str) -> tuple[Path, str]:
    try:
        return obtain(name, revision, patterns)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def _merge(
    stage: Stage, folder: Path, source: str, earlier: Sequence[Checkpoint], key: str
) -> tuple[Path, str, dict[str, str]]:
    """The folder and source of the merged model, and what run.json says of it."""
    try:
        config = read_config(folder)
        base = find_base(stage, folder, str(config.get("base_model_name_or_path") or ""), earlier)
        digest = _sha256([folder / name for name in (CONFIG, WEIGHTS)])
        merged, merged_source = merge_into(base, source, json.dumps([digest, *_tokenizer_files(folder).items()]))
    except UserError as error:
        raise UserError(f"{key}.model: {error}") from None
    return merged, merged_source, {"base": base.name, "sha256": digest}


def _small_files(model: Path, tokenizer: Path) -> dict[str, str]:
    """The hashes of the model's configuration and of its tokenizer's files, by name."""
    return {"config.json": _sha256([model / "config.json"])} | _tokenizer_files(tokenizer)


def _tokenizer_files(tokenizer: Path) -> dict[str, str]:
    found = {file for pattern in TOKENIZER_IDENTITY for file in tokenizer.glob(pattern)}
    return {file.name: _sha256([file]) for file in sorted(found)}


def load_tokenizer(folder: str, key: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a local folder. Raises UserError, naming the key, when it does not load."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises no other class, and transformers many
        raise UserError(f"{key}: no tokenizer loads from {folder}: {_why(error)}") from None
    # Without a vocabulary, transformers makes an empty tokenizer of the model's kind and says nothing.
    vocabularies = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if not any((Path(folder) / file).exists() for file in vocabularies):
        raise UserError(f"{key}: {folder} has no tokenizer.json; save the tokenizer there or name one with `tokenizer`")
    return tokenizer


def _classifies(stage: Stage) -> bool:
    return stage.objective is not None and stage.objective.kind == "classification"


def _outline(folder: Path, key: str, classifies: bool) -> tuple[Any, Any]:
    """The configuration, and the model that it describes, without weights."""
    what = "classifier" if classifies else "causal language model"
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        _check_kind(config, key, classifies)
        _check_not_quantised(config, folder, key)
        _check_attention(config, folder, key)
        with torch.device("meta"):
            return config, auto_class(classifies).from_config(config, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # a wrong value fails where a model first uses it, as whatever that raises
        raise UserError(f"{key}.model: {folder} is not a {what} that loads: {_why(error)}") from None


def _why(error: Exception) -> str:
    """What transformers raises, but for its advice to run code that a model brings."""
    if "trust_remote_code" in str(error):
        return "it brings code of its own, which is not run here; name one that transformers has a class for"
    return one_line(error)


def _context(config: Any, model: nn.Module) -> int | None:
    """Tokens that the model has positions for: RoBERTa's kind number them from behind the padding token's on."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings") and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    text = config.get_text_config()
    named = (getattr(text, name, None) for name in CONTEXT)
    return next((found for found in named if isinstance(found, int)), None)


def _check_kind(config: Any, key: str, classifies: bool) -> None:
    """The configuration says itself what its weights are of: another kind's head would be made up at random."""
    names = [name for name in config.architectures or () if name.endswith("ForSequenceClassification")]
    found = (names or config.architectures or ["a model of no named kind"])[0]
    if config.is_encoder_decoder:
        raise UserError(f"{key}.model: {found} has an encoder and a decoder; only one stack of blocks is supported")
    if not classifies:
        if names:
            raise UserError(f"{key}.model: {names[0]} has a classification head; set `objective: classification`")
        if not _sees_no_later_token(config):
            raise UserError(
                f"{key}.model: {found} sees the tokens after the one that it predicts; name a model that was trained "
                "as a causal one"
            )
        return
    if not names:
        raise UserError(
            f"{key}.objective: the model is {found}, which has no classification head; name a classifier, or leave "
            "`objective` out"
        )
    if sorted(config.id2label) != list(range(config.num_labels)):
        raise UserError(f"{key}.model: id2label of its config.json does not number its classes from 0")
    named = [str(name) for name in config.id2label.values()]
    if twice := next((name for name in named if named.count(name) > 1), None):  # a label's name would be the first's
        raise UserError(f"{key}.model: id2label of its config.json calls several classes {twice!r}; rename all but one")
    if config.problem_type not in (None, "single_label_classification") or config.num_labels < 2:
        problem = config.problem_type or "a single label, which is a regression"
        raise UserError(
            f"{key}.objective: {names[0]} is of problem_type {problem}; only single_label_classification with two "
            "classes or more is supported"
        )


def _sees_no_later_token(config: Any) -> bool:
    """What transformers builds as a causal language model need not be one: BERT and its like are encoders unless their
    configuration says that they are decoders, and others (XLM, Gemma's embeddings) have a switch."""
    text = config.get_text_config()
    if all(hasattr(type(text), name) for name in ("is_decoder", "add_cross_attention")):
        return bool(text.is_decoder)
    both_ways = getattr(text, "use_bidirectional_attention", False) in (True, "all")
    return not both_ways and all(getattr(text, name, True) is not False for name in ("causal", "is_causal"))


def _check_not_quantised(config: Any, folder: Path, key: str) -> None:
    """Whether such weights load, and as what, depends on the libraries and the device of each rank."""
    for each in (config, config.get_text_config()):
        if quantised := getattr(each, "quantization_config", None):
            method = dict(quantised).get("quant_method") or "no named method"
            raise UserError(
                f"{key}.model: {folder} holds quantised weights ({method}); dequantise the model, and save it without "
                "the quantization_config of its config.json"
            )


def _check_attention(config: Any, folder: Path, key: str) -> None:
    """BigBird's blocks are chosen at random, and by the length that a batch is padded to."""
    if getattr(config, "attention_type", None) == "block_sparse":
        raise UserError(
            f"{key}.model: {folder} has attention_type block_sparse, with which a document's gradient depends on those "
            "beside it; write original_full in its config.json"
        )


def _check_weights(model: Any, folder: Path, key: str, dtype: str | None) -> None:
    """That the files are the model's takes no time; reading every number comes last."""
    try:
        files = weight_files(folder, model.config)
        check_complete(model, folder, files)
        for file in files:
            for _ in finite_tensors(file, dtype):
                pass
    except UserError as error:
        raise UserError(f"{key}.model: {error}") from None


def _classes(config: Any) -> tuple[str, ...]:
    return tuple(str(config.id2label[number]) for number in range(config.num_labels))


def _sha256(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with open(file, "rb") as content:
            while chunk := content.read(HASH_BYTES):
                digest.update(chunk)
    return digest.hexdigest()
