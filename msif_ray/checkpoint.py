"""A stage's model as it is on disk: found, read once for its hash and its faults, never executed."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from msif_ray.adapters import find_base, merge_into
from msif_ray.config import Stage
from msif_ray.errors import UserError
from msif_ray.fetch import MODEL_FILES, TOKENIZER_FILES, TOKENIZER_IDENTITY, folder_revision, obtain
from msif_ray.influence.blocks import Blocks
from msif_ray.influence.modules import find_linear_maps
from msif_ray.lora import CONFIG, WEIGHTS, is_adapter, read_config

HASH_BYTES = 2**22


@dataclass(frozen=True)
class Checkpoint:
    """A checked model and its tokenizer: their local folders, the tokens of its context and of its vocabulary, and the
    shapes of the tracked maps `(out, columns)`.

    Another node finds the same files by `source` and `tokenizer_source` (`fetch.local_model`, `local_tokenizer`).
    `model_hash` is that of the weights; `files` has the hash of each smaller file that a score depends on. Where the
    model is an adapter, all this is of the merged model, and `adapter` says what was merged into what.
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
    adapter: dict[str, str] | None = None


def check_checkpoint(
    stage: Stage,
    modules: list[str] | None,
    key: str,
    blocks: Blocks | None = None,
    earlier: Sequence[Checkpoint] = (),
) -> Checkpoint:
    """Finds and checks a stage's model, and finds its tokenizer. An adapter is merged into the model of one of the
    `earlier` stages first.

    Raises UserError, naming the key, file or tensor, for a model that is not there, has no
    safetensors, is of an unknown kind, or holds a number that is not finite.
    """
    folder, source = _obtain(stage.model, stage.revision, MODEL_FILES, f"{key}.model")
    revision, adapter = stage.revision or folder_revision(folder), None
    if is_adapter(folder):
        folder, source, adapter = _merge(stage, folder, source, earlier, key)
    elif stage.base is not None:
        raise UserError(f"{key}.base: {folder} is a model with its own weights and no adapter; leave `base` out")
    files = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").exists():
        raise UserError(f"{key}.model: {folder} has no config.json; name a folder saved by save_pretrained")
    if not files:
        raise UserError(f"{key}.model: {folder} has no .safetensors file; save the model with safe_serialization")
    text, maps = _describe(folder, modules, key, blocks)
    for file in files:
        _check_finite(file, key)
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
        context=getattr(text, "max_position_embeddings", None),
        vocabulary=text.vocab_size,
        maps=maps,
        adapter=adapter,
    )


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
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{key}: no tokenizer loads from {folder}: {' '.join(str(error).split())[:200]}") from None
    # Without a vocabulary, transformers makes an empty tokenizer of the model's kind and says nothing.
    vocabularies = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if not any((Path(folder) / file).exists() for file in vocabularies):
        raise UserError(f"{key}: {folder} has no tokenizer.json; save the tokenizer there or name one with `tokenizer`")
    return tokenizer


def _describe(
    folder: Path, modules: list[str] | None, key: str, blocks: Blocks | None
) -> tuple[PreTrainedConfig, dict[str, tuple[int, int]]]:
    """The configuration of the model's text part and the model's tracked maps, without its weights."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{key}.model: {folder} is not a causal language model that loads: {reason}") from None
    return config.get_text_config(), {
        name: found.shape for name, found in find_linear_maps(model, modules, blocks).items()
    }


def _check_finite(file: Path, key: str) -> None:
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in list(tensors.keys()):
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise UserError(f"{key}.model: {file}: the tensor {name} holds a number that is not finite")
    except SafetensorError as error:
        raise UserError(f"{key}.model: {file} is not whole safetensors: {error}") from None


def _sha256(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with open(file, "rb") as content:
            while chunk := content.read(HASH_BYTES):
                digest.update(chunk)
    return digest.hexdigest()
