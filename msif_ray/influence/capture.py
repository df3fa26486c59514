"""Activations and output gradients of the tracked maps in one forward and backward pass.

Weights are frozen, so the backward pass goes to the activations only, and only down to the first tracked
maps' outputs: less than two thirds of a training step. The output head sees the positions that predict a
target and no others. Nothing is left on the modules when the capture ends.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle

from msif_ray.errors import UserError, one_line
from msif_ray.influence.batch import Batch
from msif_ray.influence.experts import run_one_by_one
from msif_ray.influence.heads import Pooling
from msif_ray.influence.linear import LinearMap
from msif_ray.influence.modules import output_head
from msif_ray.influence.objectives import Losses, curvature, differentiate_losses
from msif_ray.influence.onednn import model_products
from msif_ray.influence.products import wide
from msif_ray.influence.routed import RoutedModules
from msif_ray.influence.seen import Seen, Use, gather


@dataclass(frozen=True)
class Captured:
    """What one pass saw.

    `losses` `[rows]`: summed negative log-likelihood of each row's labels, in nats. `labels` `[targets]`: these
    labels, row after row; `[rows]` where a row has one.
    A map used n times in one forward pass has its uses side by side along the token axis, n·tokens
    long: its gradient is the sum over uses, and each use is a position of its own. Of an expert `vectors` has as many
    positions as a row's tokens that were routed to it; everything else is by token, with zero gradients at others.
    """

    batch: Batch
    losses: Tensor
    labels: Tensor
    maps: dict[str, LinearMap]
    _seen: dict[str, Seen]
    _targets: tuple[Tensor, Tensor]  # row and column of each position that predicts a target

    def activations(self, name: str) -> Tensor:
        """`[rows, tokens, columns]`: the map's inputs, with the constant 1 last where it has a bias."""
        inputs = self.inputs(name)
        return functional.pad(inputs, (0, 1), value=1.0) if self.maps[name].bias else inputs

    def inputs(self, name: str) -> Tensor:
        """`[rows, tokens, in]`: the map's inputs alone."""
        seen = self._seen[self.maps[name].source]
        return wide(seen.at_tokens(seen.inputs, self.batch.input_ids.shape[1]))

    def gradients(self, name: str) -> Tensor:
        """`[rows, tokens, out]`: the losses' gradient at the map's outputs; zero at padding."""
        seen = self._seen[self.maps[name].source]
        return wide(seen.at_tokens(self.maps[name].own(seen.gradients), self.batch.input_ids.shape[1]))

    def vectors(self, name: str) -> tuple[Tensor, Tensor]:
        """`[rows, positions, in]` and `[rows, positions, out]`: inputs and gradients in the model's own type."""
        seen = self._seen[self.maps[name].source]
        return seen.inputs, self.maps[name].own(seen.gradients)

    def positions(self, name: str) -> Tensor:
        """Those of the map's `vectors` whose tokens predict a target, `[targets]`, counted row after row."""
        seen, tokens = self._seen[self.maps[name].source], self.batch.input_ids.shape[1]
        if seen.tokens is not None:
            return seen.marked(self.batch.predicts).flatten().nonzero()[:, 0]
        rows, columns = self._targets  # a GPU waits for `nonzero`
        total = seen.inputs.shape[1]
        return torch.cat([rows * total + start + columns for start in range(0, total, tokens)])

    @property
    def nbytes(self) -> int:
        """Memory that the vectors hold on to: maps that share an input share its memory."""
        vectors = (each for seen in self._seen.values() for each in (seen.inputs, seen.gradients))
        storages = {storage.data_ptr(): storage.nbytes() for storage in (each.untyped_storage() for each in vectors)}
        return sum(storages.values())

    def predicts(self, name: str) -> Tensor:
        """`[rows, positions]` bool: which of the map's `vectors` are of tokens that predict a target."""
        return self._seen[self.maps[name].source].marked(self.batch.predicts)


@dataclass
class _Targets:
    """The positions that predict a target of what the model is given, which is of `shape`, counted row after row, and
    whether the head saw these alone."""

    shape: torch.Size
    positions: Tensor
    selected: bool = False


@dataclass
class Capture:
    """Context in which `run` captures the tracked maps of a causal language model, or of a classifier.

    On entry the weights are frozen and hooks set, on exit both are undone. The model is called
    as transformers' models are: `model(input_ids=, attention_mask=, use_cache=).logits`.
    """

    model: nn.Module
    maps: dict[str, LinearMap]
    _uses: dict[str, list[Use]] = field(default_factory=dict, init=False)
    _handles: list[RemovableHandle] = field(default_factory=list, init=False)
    _routed: RoutedModules | None = field(default=None, init=False)
    _pooling: Pooling | None = field(default=None, init=False)
    _undo: Callable[[], None] = field(default=lambda: None, init=False)
    _required: list[nn.Parameter] = field(default_factory=list, init=False)
    _versions: list[tuple[str, nn.Parameter, int]] = field(default_factory=list, init=False)
    _training: list[nn.Module] = field(default_factory=list, init=False)
    _targets: "_Targets | None" = field(default=None, init=False)
    _direction: Mapping[str, Tensor] | None = field(default=None, init=False)

    def __enter__(self) -> Self:
        self._training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        self._required = [weight for weight in self.model.parameters() if weight.requires_grad]
        for weight in self._required:
            weight.requires_grad_(False)
        self._versions = [(name, weight, weight._version) for name, weight in self.model.named_parameters()]
        modules = dict(self.model.named_modules())
        hooked = dict.fromkeys(each.source for each in self.maps.values() if each.expert is None)
        for source in hooked:
            hook = self._hook(source)
            self._handles.append(modules[source].register_forward_hook(hook, with_kwargs=True))
        self._routed = RoutedModules(self.model, hooked)
        self._handles += self._routed.hook()
        self._undo = run_one_by_one(self.model, self.maps, self._see)
        head = output_head(self.model)
        if head is not None and all(modules[source] is not head for source in hooked):
            self._handles.append(head.register_forward_pre_hook(self._select_targets))
        self._pooling = Pooling(self.model)
        self._handles += self._pooling.hook()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._undo()
        if self._pooling is not None:
            self._pooling.undo()
        self._routed = self._pooling = None
        self._uses.clear()
        self._versions.clear()
        for weight in self._required:
            weight.requires_grad_(True)
        for module in self._training:
            module.training = True

    def run(self, batch: Batch, uniforms: Tensor | None = None) -> Captured:
        """One forward and backward pass over the batch, which is on the model's device.

        The loss is that of the batch's objective (`objectives`); labels are the data's own, or with `uniforms`, one
        number for each of them (`labels.batch_uniforms`), drawn from the model.

        Raises UserError, naming the map, when the model uses it in a way that has no per-document
        gradient (not called, an input without a row per token, changed in place), or changes a weight.
        """
        with model_products(batch.input_ids.device):
            found = differentiate_losses(self._logits(batch), batch, uniforms)
        return self._captured(batch, found)

    def curve(self, batch: Batch, direction: Mapping[str, Tensor]) -> Captured:
        """As `run`, with the gradients of Σ_t (J_t v)ᵀ C_t f_t in place of the loss's, where f_t are a target's
        logits, J_t v their derivative in the `direction` v (`[out, columns]` by map; or `[parts, out, columns]` where
        the batch's rows are as many parts, one after another, of a direction each) and C_t = diag p − p pᵀ is held
        (or of a row's label, of the logits or the margin that it is told from):
        what they sum to over windows and positions is the Gauss-Newton Hessian times v (Martens 2020, §8.1).

        Forward-mode differentiation gives J_t v, one backward pass the rest. The losses are the data's own. Raises
        UserError as `run` does, and for a model with an operation that has no forward-mode derivative.
        """
        # Fused attention kernels have no forward-mode derivative; the plain products have.
        with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level(), model_products(batch.input_ids.device):
            self._direction = direction
            try:
                logits, tangents = forward_ad.unpack_dual(self._logits(batch))
            except (NotImplementedError, RuntimeError) as error:
                if not any(sign in str(error) for sign in ("forward AD", "jvp")):
                    raise
                raise UserError(
                    "solver: the model has an operation without a forward-mode derivative, which cg needs "
                    f"({one_line(error)}); use kind: ekfac"
                ) from None
            finally:
                self._direction = None
            # Outside the level nothing carries a tangent, so the backward pass is a plain one.
            tangents = torch.zeros_like(logits) if tangents is None else tangents.detach()
        curved, found = curvature(logits.detach(), tangents, batch)
        if logits.requires_grad:
            with model_products(batch.input_ids.device):
                logits.backward(curved)
        return self._captured(batch, found)

    def _logits(self, batch: Batch) -> Tensor:
        """One forward pass: the logits of the positions that predict a target, `[targets, vocabulary]`, or of the
        texts' classes, `[rows, classes]`."""
        self._uses = {each.source: [] for each in self.maps.values()}
        mask = batch.predicts
        rows, columns = mask.nonzero(as_tuple=True)
        input_ids, attention_mask = batch.apart(batch.input_ids), batch.apart(batch.attention_mask)
        self._targets = _Targets(input_ids.shape, rows * mask.shape[1] + columns)
        if self._pooling is not None:
            self._pooling.read(input_ids, attention_mask)
        output = self.model(input_ids=input_ids, attention_mask=attention_mask.long(), use_cache=False)
        if batch.classes is not None:
            return output.logits
        logits = output.logits.flatten(0, 1)
        return logits if self._targets.selected else logits.index_select(0, self._targets.positions)

    def _captured(self, batch: Batch, found: Losses) -> Captured:
        """What the hooks kept of the pass."""
        for name, weight, version in self._versions:
            if weight._version != version:
                raise UserError(f"modules: {name} is changed by the model's forward pass; no such model is supported")
        rows, columns = batch.predicts.nonzero(as_tuple=True)
        uses, self._uses = self._uses, {}
        shape, seen, like = batch.input_ids.shape, {}, next(self.model.parameters())
        nothing = {each.source: each.nothing(like) for each in self.maps.values()}
        for source, calls in uses.items():
            seen[source] = gather(source, calls, shape, nothing[source], batch.sequences)
        return Captured(batch, found.of_rows, found.labels, self.maps, seen, (rows, columns))

    def _select_targets(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Leaves the head the positions that predict a target, `[1, targets, hidden]`: nobody needs other logits."""
        hidden, targets = args[0], self._targets
        if targets is None or hidden.shape[:-1] != targets.shape:
            return None  # another layout: the logits are picked out afterwards
        targets.selected = True
        return (hidden.flatten(0, 1).index_select(0, targets.positions)[None], *args[1:])

    def _hook(self, source: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
            if not isinstance(output, Tensor):
                raise UserError(f"modules: {source} gives a {type(output).__name__}, not a tensor; leave it out")
            tokens = None if self._routed is None else self._routed.tokens(source)
            return self._see(source, args[0] if args else next(iter(kwargs.values())), output, tokens)

        return hook

    def _see(self, source: str, seen: Tensor, output: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Keeps a call's input, and its output's gradient when that comes; gives the output to go on with."""
        if self._direction is not None:
            seen = forward_ad.unpack_dual(seen).primal
        use = Use(seen.detach(), seen._version, tokens)
        if not torch.is_grad_enabled():
            raise UserError(f"modules: {source} is computed without gradients; leave it out")
        if not output.requires_grad:
            output = _start_of_graph(output)
        if self._direction is not None:
            output = output + self._tangent(source, use.input, self._direction, output.shape[-1])

        def keep(gradient: Tensor) -> None:
            use.gradient = gradient

        output.register_hook(keep)
        self._uses[source].append(use)
        return output

    def _tangent(self, source: str, inputs: Tensor, direction: Mapping[str, Tensor], out: int) -> Tensor:
        """Zero with the derivative of the outputs when the weights of the source's maps move in the direction."""
        tangent = inputs.new_zeros(*inputs.shape[:-1], out)
        for each in self.maps.values():
            if each.source == source:
                each.put(tangent, _moved(each, inputs, direction[each.name].to(inputs.dtype)))
        return forward_ad.make_dual(torch.zeros_like(tangent), tangent)


def _start_of_graph(output: Tensor) -> Tensor:
    """A first map's output as what the backward pass ends at: nothing before it is tracked.

    A copy, since a model may change it in place, which autograd forbids of a leaf.
    """
    return output.detach().requires_grad_(True).clone()


def _moved(described: LinearMap, inputs: Tensor, direction: Tensor) -> Tensor:
    """V [a; 1], `[..., out]`: how a map's outputs move when its weights move by V `[out, columns]`, or each part of the
    rows by its own."""
    if direction.dim() == 3:
        parts = zip(inputs.tensor_split(len(direction)), direction, strict=True)
        return torch.cat([_moved(described, own, each) for own, each in parts])
    weight, bias = (direction[:, :-1], direction[:, -1]) if described.bias else (direction, None)
    return functional.linear(inputs, weight, bias)
