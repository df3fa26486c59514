"""FLOPs and bytes of every step, from shapes and window lengths alone.

A FLOP is a multiplication or an addition: a product `[m, k] @ [k, n]` takes 2·m·k·n. Elementwise work,
norms and softmaxes are left out; they are a few percent of a language model's. The choices between
contractions are the code's own functions.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from msif_ray.cluster.sharding import gathered
from msif_ray.influence.compress import ITERATIONS, REDUCED, Metric
from msif_ray.influence.directions import DenseDirections, Directions, LowRankDirections, laid_out
from msif_ray.influence.ekfac import Basis, gradient_rotation_cost, rotates_vectors, vector_rotation_cost
from msif_ray.influence.experts import is_fused
from msif_ray.influence.groups import Shapes
from msif_ray.influence.modules import output_head
from msif_ray.influence.products import covariance_cost
from msif_ray.influence.queries import stays_dense
from msif_ray.influence.scoring import Scorer, expansion_cost, gram_cost, materialised_cost, token_cost
from msif_ray.loading import auto_class
from msif_ray.plan.tokens import Tally


@dataclass(frozen=True)
class ModelSize:
    """`parameters` of a model in all; `gathered`: of them at once on a rank that holds a shard; `multiplied`: the
    weights of its linear maps, without those of its `head`, and of its experts the share of them that a token is sent
    to; `attention`: layers times the width of all heads, 0 of a model without any."""

    parameters: int
    gathered: int
    multiplied: int
    head: int
    attention: int

    @classmethod
    def of(cls, folder: str | Path, classifies: bool = False) -> "ModelSize":
        """The size of a checkpoint's model, from its configuration."""
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = auto_class(classifies).from_config(config, trust_remote_code=False)
        return cls.of_model(model, config.get_text_config())

    @classmethod
    def of_model(cls, model: nn.Module, config: Any) -> "ModelSize":
        weights = [weight.numel() for weight in model.parameters()]
        linear = {m: m.weight.numel() for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))}
        last = output_head(model)
        head = linear.pop(last, 0) if last is not None else 0
        experts = sum(
            weight.numel() for module in model.modules() if is_fused(module) for weight in module.parameters()
        )
        multiplied = sum(linear.values()) + round(experts * _chosen_share(config))
        return cls(sum(weights), gathered(weights)[0], multiplied, head, _attention(config))


def _attention(config: Any) -> int:
    # By this name whatever the family's own (n_head, n_heads): configurations map one to the other.
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 0  # a recurrent model's
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return int(config.num_hidden_layers * width)


def _chosen_share(config: Any) -> float:
    """The share of a mixture's experts that a token is sent to."""
    counts = [getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")]
    return (getattr(config, "num_experts_per_tok", None) or 1) / next(filter(None, counts), 1)


def pass_flops(size: ModelSize, tally: Tally) -> float:
    """One forward pass and one backward pass to the activations.

    Forward, each of P multiplied weights meets every position, and the head's those that predict a target: 2·P·T.
    Attention takes QKᵀ and its product with V: 4·n²·(layers·width) for a window of n positions (masked ones are
    computed too). Weights are frozen, so the backward pass has one product for every linear map's one, and two for
    each of attention's. It ends at the first tracked maps, whose own product is counted here all the same.
    """
    maps = 4.0 * (size.multiplied * tally.positions + size.head * tally.targets)
    return maps + 12.0 * size.attention * tally.squared_lengths


def forward_flops(size: ModelSize, tally: Tally) -> float:
    """The forward pass alone."""
    return 2.0 * (size.multiplied * tally.positions + size.head * tally.targets) + (
        4.0 * size.attention * tally.squared_lengths
    )


def product_flops(size: ModelSize, shapes: Shapes, tally: Tally) -> float:
    """The Gauss-Newton Hessian of so many documents times one vector.

    A pass, the forward pass's derivative in the vector's direction (a product for every linear map's one, two for
    each of attention's), what the direction adds at tracked maps, and the gradients' sum.
    """
    derivative = 2.0 * (size.multiplied * tally.positions + size.head * tally.targets)
    derivative += 8.0 * size.attention * tally.squared_lengths
    tracked = sum(out * columns for out, columns in shapes.values())
    return pass_flops(size, tally) + derivative + 4.0 * tracked * tally.positions


def covariance_flops(shapes: Shapes, tally: Tally) -> float:
    """The lower blocks of Σ a aᵀ and Σ g gᵀ of every map over the positions that predict a target."""
    return 2.0 * tally.targets * sum(covariance_cost(side) for shape in shapes.values() for side in shape)


def correction_flops(shapes: Shapes, tally: Tally) -> float:
    """Window gradients (2·n·out·columns), and the cheaper of rotating their vectors or themselves."""
    total = 0.0
    for out, columns in shapes.values():
        for n, windows in tally.lengths.items():
            vectors = rotates_vectors(n, out, columns)
            rotation = vector_rotation_cost(n, out, columns) if vectors else gradient_rotation_cost(out, columns)
            total += 2.0 * windows * (n * out * columns + rotation)
    return total


def curvature_flops(shapes: Shapes, tally: Tally) -> float:
    """Norms in the inverse curvature: the products of a correction, and each window's squares times the weights."""
    entries = sum(out * columns for out, columns in shapes.values())
    return correction_flops(shapes, tally) + 2.0 * entries * sum(tally.lengths.values())


def scoring_flops(scorer: Scorer, tally: Tally) -> float:
    """The contractions that the scorer chooses, by its own count of multiplications; directions may be on `meta`."""
    total = 0.0
    for name, directions in scorer.directions.items():
        out, columns = direction_shape(directions)
        for n, windows in tally.lengths.items():
            rows = math.ceil(windows)
            cost = float(materialised_cost(n, out, columns, len(directions), scorer.norms))
            if isinstance(directions, LowRankDirections):
                if not scorer.materialises(name, n, rows):
                    cost = token_cost(n, out, columns, 1, directions.total_rank, scorer.norms)
                elif not scorer.keeps(name):
                    cost += expansion_cost(directions, rows)
            total += 2.0 * windows * cost
    return total


def compress_flops(shapes: Shapes, tally: Tally, rank: int) -> float:
    """Tokens of a window rotated, those of a long one after it is reduced by products with `REDUCED` ranks of vectors;
    norms by the cheaper contraction. Decompositions of a few tokens are left out."""
    total = 0.0
    for out, columns in shapes.values():
        for n, windows in tally.lengths.items():
            kept = min(n, REDUCED * rank)
            reducing = 2 * (2 * ITERATIONS + 2) * n * kept * (out + columns) if kept < n else 0
            norm = min(gram_cost(n, out, columns), materialised_cost(n, out, columns, queries=0))
            total += windows * (2.0 * vector_rotation_cost(kept, out, columns) + reducing + 2.0 * norm)
    return total


def index_bytes(shapes: Shapes, documents: float, rank: int, dtype: str, itemsize: int, groups: int) -> float:
    """An index on storage, at most: pseudo-tokens in `dtype` with their scales, the bases once, and in each of the
    `groups` of maps a norm and a number of tokens (12 bytes) per document."""
    packed = getattr(torch, dtype).itemsize
    of_maps = sum(
        documents * rank * ((out + columns) * packed + itemsize)
        + itemsize * (out * out + columns * columns + out + columns)
        for out, columns in shapes.values()
    )
    return of_maps + 12 * groups * documents


def token_score_flops(scorer: Scorer, positions: float) -> float:
    """Per-token scores of one query over so many positions: (g D)·a, or (g·U)(a·V) at low rank."""
    total = 0.0
    for directions in scorer.directions.values():
        out, columns = direction_shape(directions)
        entries = out * columns
        if isinstance(directions, LowRankDirections):
            entries = directions.total_rank // len(directions) * (out + columns)
        total += 2.0 * positions * entries
    return total


def eigen_flops(shapes: Shapes) -> float:
    """About 9·n³ for eigenvalues and vectors of a symmetric matrix (Golub and Van Loan 2013, §8.3.3), two per map."""
    return sum(9.0 * (out**3 + columns**3) for out, columns in shapes.values())


def carry_flops(shapes: Shapes, queries: int, stages: int) -> float:
    """Into the basis and back, 4·out·columns·(out + columns) per query, stage with factors and map."""
    return sum(4.0 * queries * stages * gradient_rotation_cost(*shape) for shape in shapes.values())


def truncation_flops(shapes: Shapes, queries: int, rank: int | None, energy: float | None) -> float:
    """A thin SVD of every direction that is truncated: about 6·m·n² + 20·n³ for m ≥ n (Golub and Van Loan 2013,
    §8.6.3). With `energy` every direction is decomposed, whatever comes of it."""
    decomposed = [
        (max(shape), min(shape))
        for shape in shapes.values()
        if energy is not None or (rank is not None and not stays_dense(rank, *shape))
    ]
    return sum(queries * (6.0 * m * n**2 + 20.0 * n**3) for m, n in decomposed)


def direction_shape(directions: Directions) -> tuple[int, int]:
    """`(out, columns)` of a map's directions."""
    if isinstance(directions, DenseDirections):
        return directions.matrix.shape[1], directions.matrix.shape[2]
    return directions.shape


def make_directions(
    shapes: Shapes, queries: int, rank: int | None, dtype: torch.dtype, device: torch.device
) -> dict[str, Directions]:
    """Random directions of the form that carrying back gives: dense, or of low rank where that is smaller.

    On the device `meta` they take no memory.
    """

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    made: dict[str, Directions] = {}
    for name, (out, columns) in shapes.items():
        if rank is None or stays_dense(rank, out, columns):
            made[name] = laid_out(DenseDirections(random(queries, out, columns)))
        else:
            made[name] = LowRankDirections.stacked(random(queries, rank, out), random(queries, rank, columns))
    return made


def make_bases(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> dict[str, Basis]:
    """In place of eigenbases: their numbers are no matter to time or memory, only that they are no zeros."""

    def rotation(size: int) -> Tensor:
        return torch.randn(size, size, dtype=dtype, device=device) / size**0.5

    return {name: Basis(rotation(columns), rotation(out)) for name, (out, columns) in shapes.items()}


def make_metrics(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> dict[str, Metric]:
    """Metrics of such bases."""
    bases = make_bases(shapes, dtype, device)
    weights = {name: [torch.ones(n, dtype=dtype, device=device) for n in shape] for name, shape in shapes.items()}
    return {name: Metric(bases[name], *weights[name]) for name in shapes}


def directions_bytes(directions: Mapping[str, Directions]) -> int:
    """What directions take as they are on storage."""
    tensors = [
        tensor
        for each in directions.values()
        for tensor in ([each.matrix] if isinstance(each, DenseDirections) else [each.left, each.right])
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def scorer_bytes(scorer: Scorer, tally: Tally) -> int:
    """What a rank holds to score with everything in memory: the directions, and those of low rank again where the
    scorer expands and keeps them."""
    held = directions_bytes(scorer.directions)
    for name, directions in scorer.directions.items():
        if not isinstance(directions, LowRankDirections) or not scorer.keeps(name):
            continue
        if any(scorer.materialises(name, n) for n in tally.lengths):
            out, columns = direction_shape(directions)
            held += len(directions) * out * columns * directions.left.element_size()
    return held


def covariance_bytes(shapes: Shapes, itemsize: int) -> int:
    """The sums of A and S."""
    return sum((out**2 + columns**2) * itemsize for out, columns in shapes.values())


def corrected_bytes(shapes: Shapes, itemsize: int) -> int:
    """The corrected eigenvalues, or their sums."""
    return sum(out * columns * itemsize for out, columns in shapes.values())


def stored_factor_bytes(shapes: Shapes, itemsize: int) -> int:
    """A stage's factors on storage: both bases with their eigenvalues, and the corrected eigenvalues."""
    values = sum((out + columns) * itemsize for out, columns in shapes.values())
    return covariance_bytes(shapes, itemsize) + values + corrected_bytes(shapes, itemsize)


def curvature_bytes(shapes: Shapes, itemsize: int) -> int:
    """What norms in the inverse curvature need: the bases, and a weight for every corrected eigenvalue."""
    return covariance_bytes(shapes, itemsize) + corrected_bytes(shapes, itemsize)


def gradient_bytes(shapes: Shapes, positions: float, itemsize: int) -> float:
    """Query gradients kept as their tokens: an activation and an output gradient per position and map."""
    return sum(positions * (out + columns) * itemsize for out, columns in shapes.values())
