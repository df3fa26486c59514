"""Activations and output gradients of the tracked maps in one forward and backward pass.

Weights are frozen, so the backward pass goes to the activations only: two thirds of a training
step. Nothing is left on the modules when the capture ends.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from msif_ray.errors import UserError
from msif_ray.influence.modules import LinearMap


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


# From the logits [positions, vocabulary] of the positions that predict a target, and the batch, to
# the labels [positions] whose loss is differentiated.
LabelChoice = Callable[[Tensor, Batch], Tensor]


@dataclass(frozen=True)
class Captured:
    """What one pass saw.

    `losses` `[rows]`: summed negative log-likelihood of each row's labels, in nats.
    A map used n times in one forward pass has its uses side by side along the token axis, n·tokens
    long: its gradient is the sum over uses, and each use is a position of its own.
    """

    batch: Batch
    losses: Tensor
    maps: dict[str, LinearMap]
    _inputs: dict[str, Tensor]
    _gradients: dict[str, Tensor]

    def activations(self, name: str) -> Tensor:
        """`[rows, positions, columns]`: the map's inputs, with the constant 1 last where it has a bias."""
        inputs = _accumulating(self._inputs[name])
        return functional.pad(inputs, (0, 1), value=1.0) if self.maps[name].bias else inputs

    def gradients(self, name: str) -> Tensor:
        """`[rows, positions, out]`: the losses' gradient at the map's outputs; zero at padding."""
        return _accumulating(self._gradients[name])

    def predicts(self, name: str) -> Tensor:
        """`[rows, positions]` bool: which positions of the map predict a target."""
        mask = self.batch.predicts
        return mask.repeat(1, self._inputs[name].shape[1] // mask.shape[1])


def _accumulating(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@dataclass
class _Use:
    """One call of a map: its input, the input's version when seen, and later its output's gradient."""

    input: Tensor
    version: int
    gradient: Tensor | None = None


@dataclass
class Capture:
    """Context in which `run` captures the tracked maps of a causal language model.

    On entry the weights are frozen and hooks set, on exit both are undone. The model is called
    as transformers' causal models are: `model(input_ids=, attention_mask=, use_cache=).logits`.
    """

    model: nn.Module
    maps: dict[str, LinearMap]
    _uses: dict[str, list[_Use]] = field(default_factory=dict, init=False)
    _handles: list[RemovableHandle] = field(default_factory=list, init=False)
    _required: list[nn.Parameter] = field(default_factory=list, init=False)
    _training: list[nn.Module] = field(default_factory=list, init=False)

    def __enter__(self) -> Self:
        self._training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        self._required = [weight for weight in self.model.parameters() if weight.requires_grad]
        for weight in self._required:
            weight.requires_grad_(False)
        modules = dict(self.model.named_modules())
        embeddings = cast(PreTrainedModel, self.model).get_input_embeddings()
        self._handles.append(embeddings.register_forward_hook(_start_of_graph))
        for name in self.maps:
            hook = self._hook(name)
            self._handles.append(modules[name].register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._uses.clear()
        for weight in self._required:
            weight.requires_grad_(True)
        for module in self._training:
            module.training = True

    def run(self, batch: Batch, choose_labels: LabelChoice | None = None) -> Captured:
        """One forward and backward pass over the batch, which is on the model's device.

        The loss is the sum over the positions that predict a target; labels are the data's own
        unless `choose_labels` gives others.

        Raises UserError, naming the map, when the model uses it in a way that has no per-document
        gradient (not called, an input without a row per token, changed in place).
        """
        self._uses = {name: [] for name in self.maps}
        output = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False)
        mask = batch.predicts
        logits = _accumulating(output.logits[mask])
        if choose_labels is None:
            labels = batch.input_ids.roll(-1, dims=1)[mask]
        else:
            labels = choose_labels(logits.detach(), batch)
        nats = functional.cross_entropy(logits, labels, reduction="none")
        nats.sum().backward()
        rows = mask.nonzero()[:, 0]
        losses = nats.new_zeros(len(batch.keys)).index_add_(0, rows, nats.detach())
        uses, self._uses = self._uses, {}
        shape = batch.input_ids.shape
        inputs, gradients = {}, {}
        for name, seen in uses.items():
            inputs[name] = _side_by_side(name, [_read_input(name, use) for use in seen], shape)
            gradients[name] = _side_by_side(name, [_read_gradient(name, use) for use in seen], shape)
        return Captured(batch, losses, self.maps, inputs, gradients)

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            seen = args[0] if args else next(iter(kwargs.values()))
            use = _Use(seen.detach(), seen._version)
            if not output.requires_grad:
                raise UserError(f"modules: {name} is not reached by the loss's gradient; leave it out")

            def keep(gradient: Tensor) -> None:
                use.gradient = gradient

            output.register_hook(keep)
            self._uses[name].append(use)

        return hook


def _start_of_graph(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Makes the embeddings' output the leaf at which the backward pass ends."""
    return output.detach().requires_grad_(True)


def _read_input(name: str, use: _Use) -> Tensor:
    if use.input._version != use.version:
        raise UserError(f"modules: the input of {name} is changed in place after use; leave it out")
    return use.input


def _read_gradient(name: str, use: _Use) -> Tensor:
    if use.gradient is None:
        raise UserError(f"modules: {name} is not reached by the loss's gradient; leave it out")
    return use.gradient


def _side_by_side(name: str, tensors: list[Tensor], shape: torch.Size) -> Tensor:
    """The uses of one map, `[rows, uses·tokens, features]`."""
    if not tensors:
        raise UserError(f"modules: {name} is not used in the forward pass; leave it out")
    rows, tokens = shape
    shaped = []
    for tensor in tensors:
        # Some models flatten rows and tokens before a map. An expert's tokens come in the router's
        # order instead, so a matching count would prove nothing.
        flat = tensor.dim() == 2 and tensor.shape[0] == rows * tokens and "expert" not in name
        if not flat and tensor.shape[:-1] != shape:
            raise UserError(
                f"modules: {name} sees {tuple(tensor.shape)} where [{rows}, {tokens}, features] is needed "
                "to tell documents apart; leave it out"
            )
        shaped.append(tensor.reshape(rows, tokens, -1))
    return shaped[0] if len(shaped) == 1 else torch.cat(shaped, dim=1)
