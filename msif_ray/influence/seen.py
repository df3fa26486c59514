"""What a map's module saw in one pass, whether of every token of a batch or of those that were routed to it."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """Inputs `[rows, positions, in]` of a module and its outputs' gradients `[rows, positions, out]`.

    `tokens` None: positions are the batch's tokens, once for every use of the module. Else `[rows, positions]`: which
    token of its row each position is of, −1 where a row has fewer positions than another, whose vectors are zero.
    """

    inputs: Tensor
    gradients: Tensor
    tokens: Tensor | None = None

    @classmethod
    def routed(cls, inputs: Tensor, gradients: Tensor, tokens: Tensor, shape: torch.Size) -> "Seen":
        """Of vectors `[seen, in]` and `[seen, out]` of chosen `tokens` `[seen]` of a batch of `shape`, these counted
        row after row, in any order."""
        rows, length = shape
        tokens, order = tokens.sort(stable=True)
        row = tokens // length
        sizes = torch.bincount(row, minlength=rows)
        width = max(1, int(sizes.max()))  # a row of none would be an edge case of every product
        place = torch.arange(len(row), device=row.device) - (sizes.cumsum(0) - sizes)[row]

        def spread(vectors: Tensor) -> Tensor:
            made = vectors.new_zeros(rows, width, vectors.shape[-1])
            made[row, place] = vectors[order]
            return made

        which = torch.full((rows, width), -1, device=row.device)
        which[row, place] = tokens % length
        return cls(spread(inputs), spread(gradients), which)

    def at_tokens(self, vectors: Tensor, length: int) -> Tensor:
        """Vectors `[rows, positions, n]` of this as `[rows, tokens, n]`, zero at tokens that were not routed here;
        where every token was seen, as they are."""
        if self.tokens is None:
            return vectors
        # A place behind the last takes what is of no token.
        made = vectors.new_zeros(vectors.shape[0], length + 1, vectors.shape[-1])
        places = torch.where(self.tokens < 0, length, self.tokens)[..., None].expand_as(vectors)
        return made.scatter_(1, places, vectors)[:, :length]

    def marked(self, mask: Tensor) -> Tensor:
        """`[rows, positions]` bool: the positions of tokens that `mask` `[rows, tokens]` marks."""
        if self.tokens is None:
            return mask.repeat(1, self.inputs.shape[1] // mask.shape[1])
        return mask.gather(1, self.tokens.clamp_min(0)) & (self.tokens >= 0)
