"""Whether a classifier reads a padded text as it reads the text alone."""

from typing import Any

import torch
from torch import Tensor, nn

from msif_ray.errors import UserError
from msif_ray.influence.experts import run_one_by_one
from msif_ray.influence.heads import Pooling

# Texts, their tokens, and the tokens that they are padded to; a difference of logits that no rounding makes, relative
# to the largest of all texts, by the bytes of a number.
TEXTS, SHORT, LONG = 8, 3, 6
ROUNDING = {2: 0.1, 4: 1e-3, 8: 1e-6}


def check_padding(model: nn.Module, name: str) -> None:
    """Gives a classifier short texts alone, and padded. What attention masks is not enough where a model's convolutions
    or transforms mix tokens, or where its head reads a row's last token, whichever that is.

    Raises UserError, naming the model, where the two differ.
    """
    embedded: Any = model
    vocabulary, device = embedded.config.get_text_config().vocab_size, next(model.parameters()).device
    ids = torch.arange(TEXTS * LONG, device=device).reshape(TEXTS, LONG) % vocabulary
    mask = torch.ones_like(ids, dtype=torch.bool)
    alone = _logits(model, ids[:, :SHORT], mask[:, :SHORT])
    mask[:, SHORT:] = False
    padded = _logits(model, ids.masked_fill(~mask, 0), mask)
    if (alone - padded).abs().max() > ROUNDING[alone.element_size()] * alone.abs().max():
        raise UserError(
            f"objective: {name} ({type(model).__name__}) reads a text in a padded batch otherwise than alone, so its "
            "documents' gradients would depend on those beside them; name a classifier that does not"
        )


@torch.no_grad()
def _logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    pooling = Pooling(model)
    handles = pooling.hook()
    undo = run_one_by_one(model, {}, lambda name, inputs, outputs, tokens: outputs)  # as they are captured
    try:
        pooling.read(input_ids, attention_mask)
        return model(input_ids=input_ids, attention_mask=attention_mask.long()).logits  # type: ignore[no-any-return]
    finally:
        for handle in handles:
            handle.remove()
        pooling.undo()
        undo()
