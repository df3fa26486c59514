"""Whether a classifier reads a padded text as it reads the text alone."""

import torch
from torch import Tensor, nn

from msif_ray.errors import UserError
from msif_ray.influence.heads import Pooling

# Tokens of a text, and of one that it is padded to beside; a difference of logits that no rounding makes, relative to
# the largest, by the bytes of a number.
SHORT, LONG = 3, 9
ROUNDING = {2: 0.1, 4: 1e-3, 8: 1e-6}


def check_padding(model: nn.Module, name: str) -> None:
    """Gives a classifier a short text alone, and beside a longer one. What attention masks is not enough where a
    model's convolutions or transforms mix tokens, or where its head reads a row's last token, whichever that is.

    Raises UserError, naming the model, where the two differ.
    """
    device = next(model.parameters()).device
    ids = torch.arange(4, 4 + LONG, device=device).repeat(2, 1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, SHORT:] = False
    alone = _logits(model, ids[:1, :SHORT], mask[:1, :SHORT])
    beside = _logits(model, ids.masked_fill(~mask, 0), mask)[:1]
    largest = torch.maximum(alone.abs().max(), beside.abs().max())
    if (alone - beside).abs().max() > ROUNDING[alone.element_size()] * largest:
        raise UserError(
            f"objective: {name} ({type(model).__name__}) reads a text in a padded batch otherwise than alone, so its "
            "documents' gradients would depend on those beside them; name a classifier that does not"
        )


@torch.no_grad()
def _logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    pooling = Pooling(model)
    handles = pooling.hook()
    try:
        pooling.read(input_ids, attention_mask)
        return model(input_ids=input_ids, attention_mask=attention_mask.long()).logits  # type: ignore[no-any-return]
    finally:
        for handle in handles:
            handle.remove()
        pooling.undo()
