"""Windows of documents side by side, as a model is given them."""

from dataclasses import dataclass, replace

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
    `targets[:, 0]` is False. `keys` names each row. Of texts to be classified `classes` `[rows]` (int64) holds each
    one's class, and `targets` marks all of a text's tokens.

    Of preferences a row is the sequence that was chosen, padded, and beside it the one that was rejected, padded to the
    same length; `reference` `[rows]` (float64) is log π_ref(chosen) − log π_ref(rejected), and `beta` `[rows]` β. Where
    they are `length_normalised`, each log-probability, and so each in `reference`, is divided by its number of targets.
    """

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor
    keys: tuple[WindowKey, ...]
    classes: Tensor | None = None
    reference: Tensor | None = None
    beta: Tensor | None = None
    length_normalised: bool = False

    def to(self, device: torch.device | str) -> "Batch":
        names = ("input_ids", "attention_mask", "targets", "classes", "reference", "beta")
        tensors = {name: held.to(device) for name in names if (held := getattr(self, name)) is not None}
        return replace(self, **tensors)

    @property
    def has_row_labels(self) -> bool:
        """Whether a row has one label, and not one for each of its targets."""
        return self.classes is not None or self.reference is not None

    @property
    def sequences(self) -> int:
        """How many sequences of tokens, none of which sees another, lie side by side in a row."""
        return 1 if self.reference is None else 2

    def apart(self, tokens: Tensor) -> Tensor:
        """`[rows, tokens]` with a row for each sequence, as the model is given them."""
        return tokens.reshape(len(tokens) * self.sequences, -1)

    @property
    def predicts(self) -> Tensor:
        """`[rows, tokens]` bool: the positions that predict a target.

        A class is predicted by the whole text: its gradient reaches the maps at every token, and one position a
        document would span too little of their inputs (K-FAC's expansion: Eschenhagen et al. 2023, arXiv 2311.00636).
        """
        return functional.pad(self.targets[:, 1:], (0, 1)) if self.classes is None else self.targets
