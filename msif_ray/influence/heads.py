"""Classification heads: what a model with one has beyond its backbone, and the token of each text that it reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def classification_head(model: nn.Module) -> Mapping[str, nn.Module]:
    """The modules outside the backbone of a model that classifies, by name; none of any other model."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return {}
    backbone: Any = model.base_model_prefix
    return {name: module for name, module in model.named_children() if name != backbone}


@dataclass
class Pooling:
    """Gives a decoder's classification head each text's own last token, wherever padding begins.

    transformers' decoders read a text's class at its last token that is not `pad_token_id`, and refuse several texts
    without one. Padding here is told by the attention mask, and what fills it may be any token; so the head gets, at
    every position, the hidden state of the token that a text alone would be read at: the last that is not the
    configured padding token, or the last of all where none is configured. A head that is given one vector per text (an
    encoder's) is left alone.
    """

    model: nn.Module
    _token: Tensor | None = field(default=None, init=False)
    _padding: int | None = field(default=None, init=False)
    _lacking: Any = field(default=None, init=False)  # the configuration without a padding token

    def hook(self) -> list[RemovableHandle]:
        """Sets the hooks that this needs; whoever calls takes them off, and calls `undo`."""
        linear = [module for module in classification_head(self.model).values() if isinstance(module, nn.Linear)]
        if not linear:
            return []
        model: Any = self.model
        config = model.config.get_text_config()
        self._padding = config.pad_token_id
        if self._padding is None:
            config.pad_token_id = 0  # the model would refuse a batch; which token it is has no effect
            self._lacking = config
        return [module.register_forward_pre_hook(self._pool) for module in linear]

    def undo(self) -> None:
        if self._lacking is not None:
            self._lacking.pad_token_id = None

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Tells the texts that the model is given next, `[rows, tokens]`."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        counts = attention_mask if self._padding is None else attention_mask & (input_ids != self._padding)
        self._token = (places * counts).argmax(1)

    def _pool(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0]
        if self._token is None or hidden.dim() != 3:
            return None
        own = hidden[torch.arange(len(hidden), device=hidden.device), self._token]
        return (own[:, None].expand(-1, hidden.shape[1], -1), *args[1:])
