"""run.json: all that a score depends on, written before the first step and compared on every later one."""

import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from msif_ray import __version__, layout
from msif_ray.config import Run
from msif_ray.corpus.objectives import Classes
from msif_ray.corpus.queries import asked
from msif_ray.corpus.reader import Document
from msif_ray.corpus.states import fingerprint
from msif_ray.described import description_of, named
from msif_ray.differences import first_difference
from msif_ray.errors import UserError
from msif_ray.indexes import index_folder, is_own, read_manifest
from msif_ray.manifests import CONFIG
from msif_ray.paths import exists, path_of
from msif_ray.preflight import Resolved
from msif_ray.results.parts import CURVATURE_NORM
from msif_ray.results.statistics import STATISTICS
from msif_ray.results.top import TOP
from msif_ray.shapes import Pair
from msif_ray.store import json_hash, read_json, write_json

PACKAGES = ("torch", "transformers", "ray", "deepspeed", "pyarrow", "safetensors", "numpy", "datasets")

MEANING = {
    "sign": "score > 0: the document supports the completion (training more on it would have made it likelier)",
    "unit": "nats of completion log-likelihood per unit of weight on the document's summed loss in its stage's mean "
    "loss; leaving one of N documents out changes it by about -score / N. If the scored stage's response is the "
    "identity: a product of gradients, which says nothing of that",
    "margin": "of a query about one completion rather than another, log-likelihood is the difference of the two, so "
    "score > 0: the document supports the completion over the other",
    "norm": "Frobenius norm of the gradient of the document's summed loss over the tracked maps; for several "
    "windows the root of the sum of their squares",
    "n_tokens": "tokens of the document, with its prompt, or what comes before it in a packed row, and an appended EOS",
}

# What to do about a run.json that is damaged.
PUT_BACK = "nothing else says whose results these are, so put it back from a copy, or name a new run_dir"

# Of a run with a stage that is an adapter.
ADAPTER = (
    "the adapter was merged into its base, and influence is of all parameters of the tracked maps: the curvature and "
    "the response of its stage are those of a full fine-tuning that ended there, not of the matrices that were trained"
)


class _Described(BaseModel):
    stages: list[dict[str, Any]] = []
    detail: dict[str, Any] = {}


class _Identity(BaseModel):
    run: _Described
    models: dict[str, dict[str, Any]]
    documents: dict[str, int]
    queries: list[list[Any]]
    maps: dict[str, Pair[int]]
    corpora: dict[str, dict[str, Any]] = {}
    indexes: dict[str, dict[str, Any]] = {}
    references: dict[str, dict[str, Any]] = {}


class _Record(BaseModel):
    """What a run.json must have, and may, as far as it is read again; its description is checked as one is."""

    identity: _Identity
    device: str
    versions: dict[str, str]
    strengths: dict[str, dict[str, dict[str, float]]]
    completion_tokens: dict[str, int] = {}
    out_of: dict[str, int] = {}
    index: dict[str, Any] = {}


# What an identity says that a record of an earlier version does not: of an index its manifest, of a reference model its
# configuration.
_LATER = {"indexes": "manifest", "references": "files"}

# Results that a run takes for its own where they are there; what it writes in any case is not among them.
_BELIEVED = ("factors", "references", "index", "candidates", "queries", "scores", TOP, STATISTICS)


def meaning(run: Run) -> dict[str, str]:
    """What the columns of scores mean; of queries that are classes, of those."""
    if run.queries.label is None:
        return MEANING
    words = (("completion log-likelihood", "log-likelihood of the query's class"), ("the completion", "the class"))
    found = dict(MEANING)
    for old, new in words:
        found = {key: text.replace(old, new) for key, text in found.items()}
    return found


def keep_record(resolved: Resolved, say: Callable[[str], None]) -> None:
    """Writes run.json, or checks it against the one that is there; other versions of libraries are said, and what of
    other runs' results could not be compared.

    Raises UserError as `check_record`.
    """
    for line in resolved.warnings:
        say(f"warning: {line}")
    path, record = layout.run_record(resolved.run.run_dir), check_record(resolved)
    if record is None:
        tokens = {query.id: n for query, n in zip(resolved.queries, resolved.completion_tokens, strict=True)}
        means = meaning(resolved.run) | ({"adapter": ADAPTER} if any(s.adapter for s in resolved.stages) else {})
        means |= CURVATURE_NORM if resolved.run.detail.curvature_norm else {}
        about = {"meaning": means, "versions": versions(), "strengths": {}, "completion_tokens": tokens}
        identity, device = _identity(resolved), _device(resolved)
        write_json(path, {"identity": identity, "device": device} | about | _out_of(resolved))
        return
    now = versions()
    other = {name: was for name, was in record["versions"].items() if was != now.get(name)}
    if other:
        changed = ", ".join(f"{name} {was} (now {now.get(name)})" for name, was in other.items())
        say(f"warning: this run was begun with {changed}: what is left may be rounded otherwise")
    if record.get("out_of", {}) != _out_of(resolved).get("out_of", {}):
        record.pop("out_of", None)
        write_json(path, record | _out_of(resolved))


def check_record(resolved: Resolved) -> dict[str, Any] | None:
    """The run.json that is there, None where there is none yet.

    Raises UserError, naming the first key that differs, when the run directory holds another run, and for results
    without a run.json that says whose they are.
    """
    run_dir = resolved.run.run_dir
    path = layout.run_record(run_dir)
    if not exists(path):
        _refuse_unrecorded(run_dir)
        return None
    record, device = read_record(path), _device(resolved)
    kept = record["identity"]
    difference = first_difference(named(kept), named(_comparable(_identity(resolved), kept)))
    if difference is not None:
        raise UserError(
            f"{path}: this directory holds another run: {difference}; name a new run_dir "
            "(a stage's `factors:` can reuse this one's factors)"
        )
    if record["device"] != device:
        raise UserError(
            f"cluster.gpus_per_rank: the run in {run_dir} was begun on {record['device']} and would go on on {device}; "
            "set it as it was, or name a new run_dir"
        )
    return record


def _out_of(resolved: Resolved) -> dict[str, dict[str, int]]:
    """Of how many documents those of an entry were chosen: of what the report says of them alone, so it may change."""
    found = {entry.label: entry.out_of for entry in resolved.run.score if entry.out_of is not None}
    return {"out_of": found} if found else {}


def keep_carried(run_dir: str, strengths: dict[str, Any], solvers: dict[str, Any]) -> None:
    """Adds to run.json the damping and α used, per `score` entry, stage and map, and what came of each entry's stages
    that conjugate gradients solved."""
    path = layout.run_record(run_dir)
    solved = {"solvers": solvers} if any(solvers.values()) else {}
    write_json(path, read_record(path) | {"strengths": strengths} | solved)


def read_record(path: Path) -> dict[str, Any]:
    """A whole run.json. No advice to delete it: any configuration would then be taken for that of the results."""
    record: dict[str, Any] = read_json(path, PUT_BACK, _Record)
    return record


def _refuse_unrecorded(run_dir: str) -> None:
    for name in _BELIEVED:
        if exists(path_of(run_dir) / name):
            raise UserError(
                f"run_dir: {run_dir} has {name} but no run.json, so nothing says whose results these are; "
                "put run.json back, or name a new run_dir"
            )


def keep_index(run_dir: str, stage: str, about: dict[str, Any]) -> None:
    """Adds what a finished index is to run.json: rank, type, metric, damping, tokens and bytes."""
    path = layout.run_record(run_dir)
    record = read_record(path)
    write_json(path, record | {"index": record.get("index", {}) | {stage: about}})


def versions() -> dict[str, str]:
    return {"msif_ray": __version__, "python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def _device(resolved: Resolved) -> str:
    """What computes, which takes part in rounding; how much of it a rank gets does not."""
    return "cuda" if resolved.run.cluster.gpus_per_rank else "cpu"


def _identity(resolved: Resolved) -> dict[str, Any]:
    indexes = {
        f"score.{i}": _index_identity(read_manifest(index_folder(entry)))
        for i, entry in enumerate(resolved.run.score)
        if entry.index is not None and not is_own(resolved.run, entry)
    }
    listed = {
        f"score.{i}": fingerprint(path_of(entry.candidates.path))
        for i, entry in enumerate(resolved.run.score)
        if entry.candidates is not None and entry.candidates.path is not None
    }
    references = {
        resolved.run.stages[index].name: {
            "revision": model.revision,
            "sha256": model.model_hash,
            "files": {CONFIG: model.files[CONFIG]},  # its own tokenizer is not used
        }
        for index, model in resolved.references.items()
    }
    optional = {"indexes": indexes, "candidates": listed, "references": references}
    # The description first, so that a difference is told by the key that was changed and not by what it names.
    return {
        "run": description_of(resolved.run),
        "models": {
            stage.name: {"revision": stage.revision, "sha256": stage.model_hash, "files": stage.files}
            | ({"adapter": stage.adapter} if stage.adapter else {})
            for stage in resolved.stages
        },
        "factors": resolved.reused,
        "corpora": {
            key: {file.path: content for file, content in zip(files, resolved.contents[key], strict=True)}
            for key, files in resolved.corpora.items()
        },
        "documents": resolved.documents,
        "queries": [_asked(resolved, query) for query in resolved.queries],
        "maps": {name: list(shape) for name, shape in resolved.maps.items()},
    } | {key: found for key, found in optional.items() if found}


def _index_identity(manifest: dict[str, Any]) -> dict[str, Any]:
    """An index of another run: what can be told of it in a message, and all that its manifest says."""
    return {key: manifest[key] for key in ("rank", "dtype", "bytes", "tokens")} | {"manifest": json_hash(manifest)}


def _comparable(identity: dict[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
    """An identity without what a record that is `kept` from an earlier version does not say."""
    found = dict(identity)
    for part, later in _LATER.items():
        said = kept.get(part, {})
        if part in identity:
            found[part] = {
                name: {key: value for key, value in about.items() if key != later or key in said.get(name, about)}
                for name, about in identity[part].items()
            }
    return found


def _asked(resolved: Resolved, query: Document) -> list[Any]:
    """All that a query is; of one about a class its id, its text and the class's name."""
    classes = resolved.query_objective
    if not isinstance(classes, Classes):
        return asked(query)
    return [query.id, query.text, classes.name(query.label)]
