"""What a model's own code fails at, as one line that names the model."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from msif_ray.cluster.sharding import is_lost_rank
from msif_ray.errors import UserError, one_line

# Calls of the model's products pass through here; what fails below is the model's call all the same.
_BETWEEN = "msif_ray.influence.onednn"
# These say something of the machine, and not of the model.
_MACHINE = (torch.OutOfMemoryError, torch.AcceleratorError)


@contextmanager
def told(model: str, dtype: str) -> Iterator[None]:
    """Raises UserError for what the code of a model's class in transformers raises on documents; lets all else out.

    So what a shard's rank fails with there when another one is lost: it gathers weights in the midst of the model.
    """
    try:
        yield
    except Exception as error:  # a value or a type that its class does not suit fails as anything
        if isinstance(error, (UserError, *_MACHINE)) or is_lost_rank(error) or not _raised_by_model(error):
            raise
        raise UserError(
            f"cluster.dtype: {model} fails on documents in {dtype} ({type(error).__name__}: {one_line(error)}); try "
            "another dtype, or whether transformers alone runs it"
        ) from None


def _raised_by_model(error: Exception) -> bool:
    """Whether the last of the model's code and ours that was left is the model's."""
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    left = [name for name in modules if name.startswith(("transformers.models.", "msif_ray.")) and name != _BETWEEN]
    return bool(left) and left[-1].startswith("transformers.")
