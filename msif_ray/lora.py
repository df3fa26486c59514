"""A LoRA adapter as PEFT saves it, merged into the weights that it changes: a plain checkpoint comes of it.

A map with weight W [o, i] and its adapter's A [r, i] and B [o, r] becomes

    W' = W + s·B·A,   s = α/r, or α/√r of a rank-stabilised adapter

(Hu et al. 2021, arXiv 2106.09685; Kalajdzievski 2023, arXiv 2312.03732), and with DoRA's magnitudes m [o] each row of
W' is scaled to the length m (Liu et al. 2024, arXiv 2402.09353); transposed where the map keeps its weight so (GPT-2's
Conv1D). Tensors that an adapter holds whole (`modules_to_save`, trained biases, embeddings of added tokens)
take the place of the base's. Sums are in float64, and a changed weight is kept in float32 at least: bfloat16 would
round much of a small change away.

What the theory then assumes: influence is of all parameters of the tracked maps. A stage trained through an adapter
could only move W by matrices of rank r, but its curvature and its response (H + αI)⁻¹ are here those of a stage that
was free to move all of W and ended at W'. It is the multi-stage influence of a full fine-tuning that would have
ended where the adapter did, and not a derivative through A and B. An adapter trained on a quantised base (QLoRA, which
its configuration does not say) is merged into the base as it is here, which is not quite the model that was trained.

What cannot be merged exactly is refused by name: a key of the adapter's configuration that is not known here and is
set counts as such, too.
"""

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from msif_ray.errors import UserError
from msif_ray.fetch import TOKENIZER_IDENTITY
from msif_ray.loading import auto_class
from msif_ray.weights import finite_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, MAGNITUDE = "base_model.model.", ".lora_magnitude_vector"

# Keys of the configuration that change nothing in what is merged, or that are taken into account below.
_KNOWN = re.compile(
    "alpha_pattern|auto_mapping|base_model_name_or_path|bias|corda_config|eva_config|exclude_modules|fan_in_fan_out|"
    "inference_mode|init_lora_weights|layers_pattern|layers_to_transform|lora_alpha|lora_dropout|megatron_core|"
    "modules_to_save|peft_type|peft_version|qalora_group_size|r|rank_pattern|revision|runtime_config|target_modules|"
    "task_type|use_dora|use_rslora"
)
# Ways to begin that leave the base's weights as they are. Others (PiSSA, OLoRA, LoftQ …) take something out of them.
_BEGUN = (True, False, "gaussian", "eva", "orthogonal")
_LOW_RANK = re.compile(r"(.+)\.lora_(?:(A|B)\.weight|embedding_(A|B))")
# Of a module that the adapter holds whole, `bias: all` and embeddings of added tokens make peft save two more states
# beside its own: the same once more, and the base's.
_AGAIN = re.compile(r"(.+)\.(modules_to_save|original_module)\.(.+)")


def is_adapter(folder: Path) -> bool:
    """Whether a model's folder holds an adapter and no weights of its own."""
    return (folder / CONFIG).is_file() and {file.name for file in folder.glob("*.safetensors")} <= {WEIGHTS}


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration. Raises UserError for one that cannot be merged exactly, naming why."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not the configuration of a PEFT adapter") from None
    if kind != "LORA":
        raise UserError(f"{path}: an adapter of kind {kind} is not merged here, only LORA; {_MERGE}")
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{path}: there is no {WEIGHTS} beside it; save the adapter with safe_serialization")
    if config.get("init_lora_weights", True) not in _BEGUN:
        begun = config["init_lora_weights"]
        raise UserError(f"{path}: init_lora_weights {begun!r} has changed the base's weights, too; {_MERGE}")
    odd = [key for key in sorted(config) if not _KNOWN.fullmatch(key) and config[key] not in (None, False, [], {})]
    if odd:
        raise UserError(f"{path}: an adapter with {odd[0]} is not merged here; {_MERGE}")
    return dict(config)


_MERGE = "merge it with peft (merge_and_unload) and name the saved model"


@dataclass
class _Changes:
    """What an adapter does to the tensors of a checkpoint, by the maps' dotted names: `A` and `B` of each, and the
    tensors that it replaces; of DoRA the `magnitudes`."""

    low_rank: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    whole: dict[str, Tensor] = field(default_factory=dict)


def merge(adapter: Path, base: Path, tokenizer: Path, target: Path) -> None:
    """Writes into the empty folder `target` the base's checkpoint with the adapter merged, a file at a time, and the
    adapter's tokenizer, or else that in `tokenizer`.

    Raises UserError, naming the file and the tensor, for what cannot be merged exactly.
    """
    config, changes = read_config(adapter), _read(adapter / WEIGHTS)
    scaled = set(changes.low_rank) if config.get("use_dora") else set()
    if changes.magnitudes.keys() != scaled or scaled & changes.embeddings:
        odd = sorted(changes.magnitudes.keys() ^ scaled or scaled & changes.embeddings)[0]
        raise UserError(f"{adapter / WEIGHTS}: {odd} is not a map with a magnitude as DoRA has it; {_MERGE}")
    model = _Base(base)
    scales = {name: _scale(config, name, pair["A"].shape[0]) for name, pair in changes.low_rank.items()}
    left = set(changes.whole) | {f"{name}.weight" for name in changes.low_rank}
    model.refuse_tied(left, adapter)
    names = {model.key(name, adapter): name for name in sorted(left)}
    for file in sorted(base.glob("*.safetensors")):
        tensors = {}
        with safe_open(file, framework="pt") as opened:
            for key in list(opened.keys()):
                tensors[key] = opened.get_tensor(key)
                if key in names:
                    where = f"{adapter / WEIGHTS}: {names[key]}"
                    tensors[key] = _merged(tensors[key], names[key], changes, scales, model, where)
        save_file(tensors, target / file.name, {"format": "pt"})
    for source in (*base.glob("*.index.json"), base / "config.json", *base.glob("generation_config.json")):
        shutil.copyfile(source, target / source.name)
    own = adapter if (adapter / "tokenizer_config.json").is_file() else tokenizer
    for pattern in TOKENIZER_IDENTITY:
        for source in own.glob(pattern):
            shutil.copyfile(source, target / source.name)
    _resize(target, model, changes, adapter)


def _read(path: Path) -> _Changes:
    changes = _Changes()
    again: dict[re.Match[str], Tensor] = {}
    for key, tensor in finite_tensors(path):
        name = key.removeprefix(PREFIX)
        if found := _LOW_RANK.fullmatch(name):
            changes.low_rank.setdefault(found[1], {})[found[2] or found[3]] = tensor
            changes.embeddings |= {found[1]} if found[3] else set()
        elif name.endswith(MAGNITUDE):
            changes.magnitudes[name.removesuffix(MAGNITUDE)] = tensor
        elif not key.startswith(PREFIX) or ".lora_" in name:
            raise UserError(f"{path}: the tensor {key} is not one of plain LoRA; {_MERGE}")
        elif found := _AGAIN.fullmatch(name):
            again[found] = tensor
        else:
            changes.whole[name.replace(".base_layer.", ".")] = tensor
    for name, pair in changes.low_rank.items():
        if pair.keys() != {"A", "B"} or any(each.ndim != 2 for each in pair.values()):
            raise UserError(f"{path}: {name} has not both of lora_A and lora_B as matrices")
        if pair["A"].shape[0] != pair["B"].shape[1]:
            raise UserError(f"{path}: {name} has a lora_A and a lora_B of different ranks")
    for found, tensor in again.items():
        _check_again(found, tensor, changes.whole, path)
    return changes


def _check_again(found: re.Match[str], tensor: Tensor, whole: Mapping[str, Tensor], path: Path) -> None:
    """Raises UserError unless the tensor, found by `_AGAIN`, is of a module held whole, and as that itself has it."""
    module, kind, name = found.groups()
    # Of a module inside the one held whole, peft leaves the adapter's name in: modules_to_save.default.dense.bias.
    keys = (f"{module}.{name}", f"{module}.{name.partition('.')[2]}")
    own = next((whole[key] for key in keys if key in whole), None)
    if own is None:
        raise UserError(f"{path}: {found[0]} is of no module that the adapter holds whole; {_MERGE}")
    if kind == "modules_to_save" and (own.dtype != tensor.dtype or not torch.equal(own, tensor)):
        raise UserError(f"{path}: {found[0]} is not as {module} itself has it; save the adapter again")


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """s of a map. `alpha_pattern` has expressions for the ends of maps' names, the first of which counts."""
    patterns = (config.get("alpha_pattern") or {}).items()
    alpha = next((a for pattern, a in patterns if re.match(rf"(.*\.)?({pattern})$", name)), config.get("lora_alpha", 8))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


class _Base:
    """The base's checkpoint: the names of its tensors, and what its configuration makes of them."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig  # here: tasks import this module, and need no models
        from transformers.pytorch_utils import Conv1D

        self.config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        classifies = any(name.endswith("ForSequenceClassification") for name in self.config.architectures or ())
        with torch.device("meta"):
            self.model: Any = auto_class(classifies).from_config(self.config, trust_remote_code=False)
        modules = dict(self.model.named_modules())
        ends = {id(self.model.get_input_embeddings()), id(self.model.get_output_embeddings())}
        self.transposed = {name for name, module in modules.items() if isinstance(module, Conv1D)}
        self.ends = {f"{name}.weight" for name, module in modules.items() if id(module) in ends}
        self.keys: set[str] = set()
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                self.keys |= set(tensors.keys())

    def key(self, name: str, adapter: Path) -> str:
        """The tensor of the files that an adapter's name means: files of a bare model have no prefix."""
        for key in (name, name.removeprefix(f"{self.model.base_model_prefix}.")):
            if key in self.keys:
                return key
        raise UserError(f"{adapter / WEIGHTS}: {name} is not among the base's tensors; {_MERGE}")

    def refuse_tied(self, changed: set[str], adapter: Path) -> None:
        tied = sorted(changed & self.ends)
        head = self.model.get_output_embeddings() is not None  # a classifier has none
        if tied and head and self.config.get_text_config().tie_word_embeddings:
            said = f"{tied[0]} is changed by the adapter and shared by embedding and head in the base"
            raise UserError(f"{adapter / WEIGHTS}: {said}; {_MERGE}")


def _merged(
    weight: Tensor, name: str, changes: _Changes, scales: Mapping[str, float], base: _Base, where: str
) -> Tensor:
    """A tensor of the base as the adapter leaves it; `name` is the adapter's for it."""
    kept = torch.promote_types(weight.dtype, torch.float32)
    if name in changes.whole:
        whole = changes.whole[name]
        if whole.shape[1:] != weight.shape[1:] or (whole.shape[0] != weight.shape[0] and name not in base.ends):
            raise UserError(f"{where} is {_shape(whole)}, and {_shape(weight)} in the base: another base?")
        weight = whole
    own = name.removesuffix(".weight")
    if own in changes.low_rank:
        pair = changes.low_rank[own]
        change = scales[own] * (pair["B"].double() @ pair["A"].double())
        if own in base.transposed or own in changes.embeddings:
            change = change.T
        if change.shape != weight.shape:
            raise UserError(f"{where} is changed by {_shape(change)}, and {_shape(weight)} in the base: another base?")
        weight = weight.double() + change
    if own in changes.magnitudes:
        rows = int(own in base.transposed)  # the dimension of the map's outputs
        lengths = torch.linalg.vector_norm(weight, dim=1 - rows, keepdim=True)
        weight = weight * (changes.magnitudes[own].double().reshape(lengths.shape) / lengths)
    return weight.to(kept).contiguous()


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))


def _resize(target: Path, base: _Base, changes: _Changes, adapter: Path) -> None:
    """Says in the configuration how many tokens there are now, where the adapter's embeddings are of more."""
    before = base.config.get_text_config().vocab_size
    rows = {name: changes.whole[name].shape[0] if name in changes.whole else before for name in base.ends}
    if len(set(rows.values())) > 1:
        said = " and ".join(f"{name} {count}" for name, count in sorted(rows.items()))
        raise UserError(f"{adapter / WEIGHTS}: embedding and head have different numbers of tokens: {said}; {_MERGE}")
    if set(rows.values()) == {before}:
        return
    path = target / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    holder = config if "vocab_size" in config else config["text_config"]
    holder["vocab_size"] = next(iter(rows.values()))
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
