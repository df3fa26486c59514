"""A stage's model as it is on disk: found, read once for its hash and its faults, never executed."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from msif_ray.config import Stage
from msif_ray.errors import UserError
from msif_ray.fetch import MODEL_FILES, fetched, hub_folder, hub_source, local_tokenizer
from msif_ray.influence.modules import find_linear_maps
from msif_ray.paths import is_remote

HASH_BYTES = 2**22


@dataclass(frozen=True)
class Checkpoint:
    """A checked model: its local folder, what it is, and the shapes of its tracked maps `(out, columns)`.

    `source` is what another node gives to `fetch.local_model` for the same files.
    """

    name: str
    model_path: str
    source: str
    model_hash: str
    revision: str | None
    context: int | None
    maps: dict[str, tuple[int, int]]


def check_checkpoint(stage: Stage, modules: list[str] | None, key: str) -> Checkpoint:
    """Finds and checks a stage's model.

    Raises UserError, naming the key, file or tensor, for a model that is not there, has no
    safetensors, is of an unknown kind, or holds a number that is not finite.
    """
    folder = locate(stage, key)
    files = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").exists():
        raise UserError(f"{key}.model: {folder} has no config.json; name a folder saved by save_pretrained")
    if not files:
        raise UserError(f"{key}.model: {folder} has no .safetensors file; save the model with safe_serialization")
    context, maps = _describe(folder, modules, key)
    for file in files:
        _check_finite(file, key)
    revision = stage.revision or folder_revision(folder)
    return Checkpoint(stage.name, str(folder), source_of(stage, folder), _sha256(files), revision, context, maps)


def locate(stage: Stage, key: str) -> Path:
    """The model's local folder, fetched when it is on object storage or the name of a model on the hub."""
    if os.path.isdir(stage.model):
        return Path(stage.model).resolve()
    remote = is_remote(stage.model)
    if not remote and (stage.model.startswith((".", "/", "~")) or stage.model.count("/") > 1):
        raise UserError(f"{key}.model: {stage.model}: no such folder")
    try:
        return fetched(stage.model, MODEL_FILES) if remote else hub_folder(stage.model, stage.revision)
    except UserError as error:
        raise UserError(f"{key}.model: {error}") from None


def source_of(stage: Stage, folder: Path) -> str:
    """What other nodes fetch: a URL as it is given, a hub model's commit that was found; a folder is theirs too."""
    if is_remote(stage.model):
        return stage.model
    revision = folder_revision(folder)
    return hub_source(stage.model, revision) if revision and not os.path.isdir(stage.model) else str(folder)


def folder_revision(folder: Path) -> str | None:
    """The commit of a hub snapshot, which its folder is named after."""
    return folder.name if folder.parent.name == "snapshots" else None


def load_tokenizer(name: str, key: str) -> PreTrainedTokenizerBase:
    """A stage's tokenizer. Raises UserError, naming the key, when it does not load."""
    try:
        name = local_tokenizer(name)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{key}: no tokenizer loads from {name}: {' '.join(str(error).split())[:200]}") from None
    # Without a vocabulary, transformers makes an empty tokenizer of the model's kind and says nothing.
    vocabularies = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if os.path.isdir(name) and not any((Path(name) / file).exists() for file in vocabularies):
        raise UserError(f"{key}: {name} has no tokenizer.json; save the tokenizer there or name one with `tokenizer`")
    return tokenizer


def _describe(folder: Path, modules: list[str] | None, key: str) -> tuple[int | None, dict[str, tuple[int, int]]]:
    """The model's context length and tracked maps, from its configuration alone."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{key}.model: {folder} is not a causal language model that loads: {reason}") from None
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return context, {name: found.shape for name, found in find_linear_maps(model, modules).items()}


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
