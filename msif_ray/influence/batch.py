"""Windows of documents side by side, as a model is given them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class WindowKey:
    """Which window of which document a batch row is."""

    document_id: str
    window: int


@dataclass(frozen=True)
class Batch:
    """Right-padded windows.

    `input_ids`, `attention_mask` and `targets` are `[rows, tokens]` (int64, bool, bool);
    `targets[b, t]` says that token t's log-likelihood counts, predicted at position t − 1, so
    `targets[:, 0]` is False. `keys` names each row.
    """

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor
    keys: tuple[WindowKey, ...]

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.targets.to(device), self.keys)

    @property
    def predicts(self) -> Tensor:
        """`[rows, tokens]` bool: the positions that predict a target."""
        return functional.pad(self.targets[:, 1:], (0, 1))
