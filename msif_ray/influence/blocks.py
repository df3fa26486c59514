"""Query, key and value maps cut into blocks: per projection, or per projection and head.

A block is some rows of a module's map and is a tracked map itself: it has the module's inputs, its own S, its own
corrected eigenvalues and its own damping, so curvature between blocks is left out (Bao et al. 2025), as it
is between any two maps. Scores stay sums over maps, and without curvature (identity responses) they are the same.
Which rows are whose is exact per family, from the configuration; a fused layout that is not known is refused.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from msif_ray.errors import UserError
from msif_ray.influence.linear import LinearMap, Rows, Spans

Blocks = Literal["qkv", "heads"]

# Names of maps with one projection each, and of those that hold all three.
SEPARATE = {"q_proj": "q", "k_proj": "k", "v_proj": "v"}
FUSED = ("query_key_value", "qkv_proj", "c_attn", "Wqkv", "in_proj_qkv", "qkv", "W_pack", "wqkv", "att_proj")


@dataclass(frozen=True)
class Heads:
    """The attention heads of one map: of queries, and of keys and values, each of `size` outputs."""

    queries: int
    keys: int
    size: int


@dataclass(frozen=True)
class _Part:
    """One projection's rows: one pair per head, from the first to before the last."""

    label: str
    heads: Spans


def cut(maps: dict[str, LinearMap], config: Any, blocks: Blocks) -> dict[str, LinearMap]:
    """The maps with those of queries, keys and values cut into blocks, named `<module>.q` (`k`, `v`) or
    `<module>.q.<head>`; others stay.

    Raises UserError, naming the map, for a layout that is not known or that does not fit the configuration, and for a
    model without any such map.
    """
    found: dict[str, LinearMap] = {}
    for name, described in maps.items():
        parts = _parts(described, config)
        found |= {each.name: each for each in _cut(described, parts, blocks)} if parts else {name: described}
    if all(each.rows is None for each in found.values()) and not any(_projection(name) for name in maps):
        raise UserError("blocks: the tracked maps are no queries, keys or values; leave `blocks` out")
    return found


def _cut(described: LinearMap, parts: list[_Part], blocks: Blocks) -> Iterator[LinearMap]:
    for part in parts:
        if blocks == "heads":
            named: dict[str, Spans] = {f"{part.label}.{head}": (span,) for head, span in enumerate(part.heads)}
        elif len(parts) == 1:
            yield described  # a map of one projection is its own block
            continue
        else:
            named = {part.label: part.heads}
        for label, spans in named.items():
            name, size = f"{described.name}.{label}", sum(stop - start for start, stop in spans)
            yield replace(described, name=name, out_features=size, rows=Rows(described.name, spans))


def _projection(name: str) -> str | None:
    return SEPARATE.get(name.rpartition(".")[2])


def _parts(described: LinearMap, config: Any) -> list[_Part] | None:
    """The projections that a map holds, or None where it is no query, key or value."""
    own, heads = described.name.rpartition(".")[2], _heads(config)
    label = _projection(described.name)
    if label is not None:
        count = heads.queries if label == "q" else heads.keys
        parts = [_Part(label, _even(count, 0, heads.size, heads.size))]
    elif own in FUSED:
        layout = LAYOUTS.get(getattr(config, "model_type", ""))
        if layout is None:
            raise UserError(
                f"blocks: how {described.name} holds queries, keys and values is not known of a "
                f"{getattr(config, 'model_type', 'model')!r}; leave `blocks` out, or add it to influence/blocks.py"
            )
        parts = layout(heads, config)
    else:
        return None
    rows = sorted(span for part in parts for span in part.heads)
    if [0, *(stop for _, stop in rows)] != [*(start for start, _ in rows), described.out_features]:
        raise UserError(
            f"blocks: the {described.out_features} outputs of {described.name} are not {heads.queries} query and "
            f"{heads.keys} key heads of {heads.size}, as its configuration says; leave `blocks` out"
        )
    return parts


def _heads(config: Any) -> Heads:
    queries = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or queries
    return Heads(queries, keys, getattr(config, "head_dim", None) or config.hidden_size // queries)


def _even(count: int, first: int, size: int, stride: int) -> Spans:
    return tuple((first + head * stride, first + head * stride + size) for head in range(count))


def _one_after_the_other(heads: Heads, config: Any) -> list[_Part]:
    """All heads' queries, then all keys, then all values."""
    counts, first, parts = {"q": heads.queries, "k": heads.keys, "v": heads.keys}, 0, []
    for label, count in counts.items():
        parts.append(_Part(label, _even(count, first, heads.size, heads.size)))
        first += count * heads.size
    return parts


def _head_by_head(heads: Heads, config: Any) -> list[_Part]:
    """The first head's query, key and value, then the second's."""
    return [_Part(label, _even(heads.queries, at * heads.size, heads.size, 3 * heads.size)) for at, label in _QKV]


def _falcon(heads: Heads, config: Any) -> list[_Part]:
    """Groups of query heads, each with the key and the value that it shares; in the first architecture one group, or
    head by head."""
    if not config.new_decoder_architecture and not config.multi_query:
        return _head_by_head(heads, config)
    groups = config.num_kv_heads if config.new_decoder_architecture else 1
    each, size = heads.queries // groups, heads.size
    stride = (each + 2) * size
    queries = tuple(span for group in range(groups) for span in _even(each, group * stride, size, size))
    keys = [_Part(label, _even(groups, (each + at) * size, size, stride)) for at, label in ((0, "k"), (1, "v"))]
    return [_Part("q", queries), *keys]


_QKV = ((0, "q"), (1, "k"), (2, "v"))

LAYOUTS: dict[str, Callable[[Heads, Any], list[_Part]]] = {
    "gpt2": _one_after_the_other,
    "gpt_neox": _head_by_head,
    "bloom": _head_by_head,
    "falcon": _falcon,
    "phi3": _one_after_the_other,
}
