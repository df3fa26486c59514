"""TRAK (Park et al. 2023): randomly projected gradients, and the inverse of their own second moment.

The model output f of a text is the sum over its targets of log(p / (1 − p)), p a target's probability. With φ(z) the
projected gradient of f(z), Φ `[documents, dimension]` those of training documents, and φ_ℓ(z) that of the loss ℓ(z),
which is Σ_t −(1 − p_t) ∇f_t (the published Q, for every target by itself),

    score(q, z) = φ(q)ᵀ (ΦᵀΦ)⁻¹ φ_ℓ(z)

up to a sign that makes a positive score support the query. One model takes part, where the authors average several.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msif_ray.corpus.windows import Encoded
from msif_ray.influence.modules import LinearMap
from msif_ray.validate.problem import Scores
from msif_ray.validate.setting import Setting, batches

Output = Callable[[Tensor, Tensor], Tensor]
"""A number from logits `[targets, vocabulary]` and labels `[targets]`."""

# Gradients that are projected together, and columns of a projection that are turned into float32 at once.
ROWS, COLUMNS = 32, 2**16


@dataclass(frozen=True)
class Projection:
    """Random signs over √dimension: `signs` `[dimension, parameters]` (int8) of each map."""

    signs: Mapping[str, Tensor]

    @classmethod
    def draw(cls, maps: Mapping[str, LinearMap], dimension: int, seed: int) -> "Projection":
        generator = torch.Generator().manual_seed(seed)
        return cls(
            {
                name: torch.randint(0, 2, (dimension, each.parameters), generator=generator, dtype=torch.int8) * 2 - 1
                for name, each in maps.items()
            }
        )

    def apply(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """`[rows, dimension]` in float64, of gradients `[rows, parameters]` by map."""
        total: Tensor | float = 0.0
        for name, signs in self.signs.items():
            for some, columns in zip(signs.split(COLUMNS, 1), gradients[name].split(COLUMNS, 1), strict=True):
                total = total + (columns @ some.to(columns.dtype).T).double()
        return torch.as_tensor(total) / len(next(iter(self.signs.values()))) ** 0.5


@dataclass(frozen=True)
class Trak:
    """The projection, and the features' second moment ΦᵀΦ `[dimension, dimension]` over training documents."""

    setting: Setting
    projection: Projection
    moment: Tensor

    @classmethod
    def fit(cls, setting: Setting, documents: Sequence[Encoded], dimension: int, seed: int) -> "Trak":
        """From at least `dimension` documents; ValueError otherwise, since ΦᵀΦ would be singular."""
        if len(documents) < dimension:
            raise ValueError(f"TRAK of dimension {dimension} needs as many documents, not {len(documents)}")
        projection = Projection.draw(setting.maps, dimension, seed)
        features = project(setting, projection, documents, margin)
        return cls(setting, projection, features.T @ features)

    def scores(self) -> Scores:
        """`[queries, documents]` of the setting's."""
        queries = project(self.setting, self.projection, self.setting.queries, margin)
        scored = project(self.setting, self.projection, self.setting.scored, loss)
        # The margin falls where the loss rises, so this is positive where a document supports the query.
        return (-queries @ torch.linalg.solve(self.moment, scored.T)).numpy()


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Σ log(p / (1 − p)) of labels `[targets]` at logits `[targets, vocabulary]`: the label's logit over all others."""
    chosen = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return (chosen.squeeze(1) - others.logsumexp(1)).sum()


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Σ −log p, in nats."""
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


def project(setting: Setting, projection: Projection, documents: Sequence[Encoded], output: Output) -> Tensor:
    """Projected gradients of a document's `output`, `[documents, dimension]`, each document by itself."""
    parts = []
    for start in range(0, len(documents), ROWS):
        found = [_gradients(setting, document, output) for document in documents[start : start + ROWS]]
        parts.append(projection.apply({name: torch.stack([each[name] for each in found]) for name in setting.maps}))
    return torch.cat(parts)


def _gradients(setting: Setting, document: Encoded, output: Output) -> dict[str, Tensor]:
    """By map, flat: of the weight and, as the last column, of the bias."""
    modules = [setting.model.get_submodule(name) for name in setting.maps]
    weights = [weight for module in modules for weight in (module.weight, module.bias)]
    outputs = []
    for batch in batches([document], 1):
        logits = setting.model(input_ids=batch.input_ids, use_cache=False).logits
        outputs.append(output(logits[batch.predicts], batch.input_ids.roll(-1, dims=1)[batch.predicts]))
    found = torch.autograd.grad(outputs, weights)
    pairs = zip(found[::2], found[1::2], strict=True)
    return {
        name: torch.cat([weight, bias[:, None]], dim=1).flatten()
        for name, (weight, bias) in zip(setting.maps, pairs, strict=True)
    }
