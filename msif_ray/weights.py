"""A checkpoint's weights as files: which are loaded, that they hold all of a model's tensors, and finite numbers."""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging

from msif_ray.errors import UserError

AGAIN = "copy or save the whole model again"
DEQUANTISE = "dequantise the model and save it in bfloat16 or float32 first"


def weight_files(folder: Path, config: Any) -> list[Path]:
    """The files that transformers loads: not every one of a folder, and none of another name.

    Raises UserError where there are none, and for an index that does not name them or names one that is not there.
    """
    named = getattr(config, "transformers_weights", None)
    if named is not None and not isinstance(named, str):
        raise UserError(f"{folder}: transformers_weights of its config.json is {named!r}, not the name of a file")
    names = [named] if named else [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]
    first = next((folder / name for name in names if (folder / name).is_file()), None)
    if first is None:
        other = min(file.name for file in folder.glob("*.safetensors"))
        wanted = " or ".join(names)
        raise UserError(
            f"{folder} has no {wanted}, from which a model is loaded; rename {other}, or save the model with "
            "save_pretrained"
        )
    if first.suffix != ".json":
        return [first]
    files = _indexed(first)
    for file in files:
        if not file.is_file():
            raise UserError(f"{folder} has no {file.name}, which its {first.name} names; {AGAIN}")
    return files


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [index.parent / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        files = []
    if not files:
        raise UserError(f"{index} does not say which file holds which tensor; {AGAIN}")
    return files


def check_complete(model: Any, folder: Path, files: list[Path]) -> None:
    """Raises UserError unless these files of the folder hold every tensor of the model, in its shape.

    transformers makes up at random what they lack, and says so in a log at most. It is asked here itself, since it
    renames, converts and ties tensors as it loads them; but with tensors that have shapes and no content, so that
    nothing is read but the files' headers.
    """
    stored, own = {}, model.state_dict()
    for file in files:
        with _opened(file) as tensors:
            for name in list(tensors.keys()):
                described = tensors.get_slice(name)
                kind = described.get_dtype()
                if name in own and own[name].is_floating_point() and "F" not in kind:  # transformers would cast them
                    raise UserError(f"{file}: the tensor {name} is of {kind}, as quantised weights are; {DEQUANTISE}")
                stored[name] = torch.empty(described.get_shape(), device="meta")
    said = f"{folder} does not load as {type(model).__name__}"
    try:
        with _silent():
            _, found = type(model).from_pretrained(
                None,
                config=model.config,
                state_dict=stored,
                device_map="meta",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except RuntimeError:  # what does not become one tensor of several, of which the reason is in the log alone
        raise UserError(f"{said}: tensors that it joins are not all there, or of other shapes; {AGAIN}") from None
    if found["missing_keys"]:
        raise UserError(f"{folder} has no tensor {_missing(found['missing_keys'], stored)}")
    for name, shape, wanted in sorted(found["mismatched_keys"]):
        raise UserError(
            f"{folder}: the tensor {name} is {_shape(shape)}, and {_shape(wanted)} by config.json; put the config.json "
            "there that belongs to the weights"
        )


def _missing(missing: Collection[str], stored: Mapping[str, Tensor]) -> str:
    """Names a tensor that is missing, how many others are, and what else the files hold under its name."""
    first = min(missing)
    said = f"{first} nor {len(missing) - 1} others" if len(missing) > 1 else first
    said += ", which would be made up at random; "
    for name in sorted(stored):
        parts = name.split(".")
        for count in range(1, len(parts)):
            if ".".join(parts[count:]) in missing:
                wrapper = ".".join(parts[:count])
                return f"{said}it holds {name}: save the model itself, not what `{wrapper}.` wraps it in"
    return f"{said}{AGAIN}, with the config.json that belongs to it"


def finite_tensors(file: Path, dtype: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """A file's tensors, one after the other.

    Raises UserError, naming file and tensor, for a number that is not finite, or not in the `dtype` that a run computes
    in, for a kind of numbers that only has a meaning with scales beside it, and for a file that is not whole.
    """
    with _opened(file) as tensors:
        for name in list(tensors.keys()):
            tensor = tensors.get_tensor(name)
            if tensor.is_floating_point():
                if tensor.dtype.itemsize < 2:
                    kind = str(tensor.dtype).removeprefix("torch.")
                    raise UserError(f"{file}: the tensor {name} is of {kind}; {DEQUANTISE}")
                if not torch.isfinite(tensor).all():
                    raise UserError(f"{file}: the tensor {name} holds a number that is not finite")
                if dtype is not None and not _fits(tensor, getattr(torch, dtype)):
                    raise UserError(
                        f"{file}: the tensor {name} holds a number that {dtype} has not, and that would be infinite; "
                        "set cluster.dtype: float64"
                    )
            yield name, tensor


def _fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether finite numbers stay finite. All but float64 is taken to: what is nearly float32's largest there is no
    weight, but what masks are filled with."""
    if tensor.dtype != torch.float64 or not tensor.numel():
        return True
    return bool(torch.stack(tensor.aminmax()).to(dtype).isfinite().all())


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise UserError(f"{file} is not whole safetensors: {error}") from None


@contextmanager
def _silent() -> Iterator[None]:
    """Meanwhile transformers prints neither a progress bar nor a table of what is missing."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _shape(shape: Collection[int]) -> str:
    return " x ".join(map(str, shape))
