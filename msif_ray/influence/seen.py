"""What a map's module saw in one pass, whether of every token of a batch or of those that were routed to it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from msif_ray.errors import UserError
from msif_ray.influence.linear import is_routed


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


@dataclass
class Use:
    """One call of a map: its input, the input's version when seen, which tokens of the batch it was of (None: all),
    and later its output's gradient."""

    input: Tensor
    version: int
    tokens: Tensor | None = None
    gradient: Tensor | None = None


def gather(name: str, calls: list[Use], shape: torch.Size, nothing: tuple[Tensor, Tensor], sequences: int = 1) -> Seen:
    """What a module saw in all its calls in one pass over a batch of `shape`; of an expert that no token of the batch
    was sent to, `nothing`: inputs `[0, in]` and gradients `[0, out]`. The model was given so many `sequences` of each
    row as rows of their own.

    Raises UserError, naming the module, for calls that do not tell documents apart.
    """
    if is_routed(name) and all(use.tokens is not None for use in calls):
        return _routed(name, calls, shape, nothing)
    inputs = _side_by_side(name, [_read_input(name, use) for use in calls], shape, sequences)
    return Seen(inputs, _side_by_side(name, [_read_gradient(name, use) for use in calls], shape, sequences))


def _read_input(name: str, use: Use) -> Tensor:
    if use.input._version != use.version:
        raise UserError(f"modules: the input of {name} is changed in place after use; leave it out")
    return use.input


def _read_gradient(name: str, use: Use) -> Tensor:
    if use.gradient is None:
        raise UserError(f"modules: {name} is not reached by the loss's gradient; leave it out")
    return use.gradient


def _routed(name: str, calls: list[Use], shape: torch.Size, nothing: tuple[Tensor, Tensor]) -> Seen:
    inputs, gradients = nothing
    tokens = torch.zeros(0, dtype=torch.int64, device=inputs.device)
    calls = [use for use in calls if use.input.numel()]
    if calls:
        inputs = torch.cat([_read_input(name, use).flatten(0, -2) for use in calls])
        gradients = torch.cat([_read_gradient(name, use).flatten(0, -2) for use in calls])
        tokens = torch.cat([use.tokens for use in calls if use.tokens is not None])
        if len(tokens.unique()) < len(tokens):
            raise UserError(f"modules: {name} sees a token twice; leave it out")
    return Seen.routed(inputs, gradients, tokens, shape)


def _side_by_side(name: str, tensors: list[Tensor], shape: torch.Size, sequences: int) -> Tensor:
    """The uses of one map, `[rows, uses·tokens, features]`."""
    if not tensors:
        raise UserError(f"modules: {name} is not used in the forward pass; leave it out")
    rows, tokens = shape
    given = torch.Size((rows * sequences, tokens // sequences))
    shaped = []
    for tensor in tensors:
        if tensor.dim() == 4 and tensor.shape[1] == 1:
            tensor = tensor[:, 0]  # latent attention, as DeepSeek's: one head until it is spread to all
        # Some models flatten rows and tokens before a map. An expert's tokens come in the router's
        # order instead, so a matching count would prove nothing.
        flat = tensor.dim() == 2 and tensor.shape[0] == rows * tokens and not is_routed(name)
        if not flat and tensor.shape[:-1] != given:
            raise UserError(
                f"modules: {name} sees {tuple(tensor.shape)} where [{given[0]}, {given[1]}, features] is needed "
                "to tell documents apart; leave it out"
            )
        shaped.append(tensor.reshape(rows, tokens, -1))
    return shaped[0] if len(shaped) == 1 else torch.cat(shaped, dim=1)
