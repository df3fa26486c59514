"""A run description is validated to one line that names the source and the key."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from msif_ray.config import CgSolver, EkfacSolver, Strength, load_run, parse_run
from msif_ray.errors import UserError

DESCRIPTION: dict[str, Any] = {
    "run_dir": "out",
    "stages": [
        {"name": "pre", "model": "a", "documents": {"path": "a.jsonl", "text": "text"}},
        {"name": "tune", "model": "b", "documents": {"path": "b.jsonl", "prompt": "p", "completion": "c"}},
    ],
    "queries": {"path": "q.jsonl"},
    "score": [{"stage": "pre"}],
}


def changed_all(changes: dict[str, Any]) -> dict[str, Any]:
    description = DESCRIPTION
    for key, value in changes.items():
        description = changed(key, value, description)
    return description


def changed(key: str, value: Any, original: dict[str, Any] = DESCRIPTION) -> dict[str, Any]:
    """The description with the value at a dotted key replaced, or removed when it is `...`."""
    description: Any = copy.deepcopy(original)
    *parents, last = (int(part) if part.isdigit() else part for part in key.split("."))
    target = description
    for parent in parents:
        target = target.setdefault(parent, {}) if isinstance(target, dict) else target[parent]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return description


def test_defaults() -> None:
    run = parse_run(DESCRIPTION)
    pre, tune = run.stages
    assert pre.damping == Strength(relative=0.01) and pre.fit.labels == "sampled" and pre.fit.max_tokens is None
    assert pre.documents is not None and not pre.documents.ends_with_eos
    assert tune.documents is not None and tune.documents.ends_with_eos
    assert run.queries.documents.ends_with_eos
    assert run.scored_documents(run.score[0]) == pre.documents
    assert (run.cluster.replicas.min, run.cluster.replicas.max) == (1, 1)


def test_a_number_of_replicas_fixes_it() -> None:
    replicas = parse_run(changed("cluster.replicas", 3)).cluster.replicas
    assert (replicas.min, replicas.max) == (3, 3)


@pytest.mark.parametrize(("strength", "resolved"), [(Strength(absolute=2.0), 2.0), (Strength(relative=0.1), 0.1 * 30)])
def test_a_strength_is_absolute_or_a_multiple_of_the_mean_eigenvalue(strength: Strength, resolved: float) -> None:
    assert strength.resolve(30.0) == pytest.approx(resolved, rel=1e-15)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("run_dirs", "x", "run_dirs: unknown key"),
        ("stages.1.documents.completions", "x", "stages.1.documents.completions: unknown key"),
        ("run_dir", ..., "run_dir: is missing"),
        ("run_dir", "", "run_dir: the path is empty; name a folder or a file"),
        ("run_dir", "a\0b", r"run_dir: 'a\x00b': a path has neither null characters nor lone surrogates"),
        ("run_dir", "a/\ud800", r"run_dir: 'a/\ud800': a path has neither"),
        ("stages.0.model", "s3://", "stages.0.model: s3://: there is no bucket in it; name one after s3://"),
        ("queries.path", ["q", "gs:///x"], "queries.path: gs:///x: there is no bucket in it"),
        (
            "queries.path",
            "s3://b[k]t/q",
            "queries.path: s3://b[k]t/q: a bucket is named in full, without *, ?, [ and ]",
        ),
        ("run_dir", "s3://b//x", "run_dir: s3://b//x: its first folder has no name; leave out a slash"),
        ("stages.0.model", "gs://b//", "stages.0.model: gs://b//: its first folder has no name"),
        ("stages.0.model", ..., "stages.0.model: is missing"),
        ("seed", "x", "seed: input should be a valid integer"),
        ("stages", [], "stages: is empty; give one at least"),
        ("score.0.candidates", {"top": 3}, "score.0.candidates: give either `method: bm25` or `path`"),
        ("score.0", {"stage": "pre", "index": "r", "candidates": {"path": "c"}}, "score.0.candidates: an index is"),
        ("stages.0.name", "a/b", "stages.0.name: string should match"),
        ("stages.1.name", "pre", "stages: the name 'pre' is there twice"),
        ("stages.0.documents.text", ..., "stages.0.documents: give one of `text`, `completion`"),
        ("stages.0.documents.prompt", "p", "stages.0.documents: `prompt` goes with `completion`"),
        ("stages.0.response", {"kind": "proximal"}, "stages.0.response: 'pre' is the first stage"),
        ("stages.1.response", {"kind": "proxmal"}, "stages.1.response.kind: give one of proximal, "),
        ("stages.1.response", {"kind": "proximal", "alfa": 1}, "stages.1.response.alfa: unknown key"),
        ("stages.1.response", {"kind": "unrolled", "rate": 0.1}, "stages.1.response.steps: is missing"),
        ("stages.1.response", {"kind": "unrolled", "rate": -1, "steps": 3}, "stages.1.response.rate: "),
        ("stages.0.damping", {}, "stages.0.damping: give either `absolute` or `relative`"),
        ("stages.0.damping", {"absolute": 1, "relative": 1}, "stages.0.damping: give either"),
        ("stages.0.damping", {"relative": 0}, "stages.0.damping.relative: input should be greater than 0"),
        ("stages.0.damping", {"absolute": float("inf")}, "stages.0.damping.absolute: "),
        ("stages.0.fit", {"max_tokens": 1}, "stages.0.fit.max_tokens: "),
        ("stages.0.fit", {"labels": "true"}, "stages.0.fit.labels: "),
        ("queries.rank", 0, "queries.rank: "),
        ("queries.energy", 1.5, "queries.energy: "),
        ("cluster.factor_memory", "lots", "cluster.factor_memory: give bytes, or a size as 8GiB, not 'lots'"),
        ("cluster.factor_memory", "8 foo", "cluster.factor_memory: give bytes, or a size as 8GiB, not '8 foo'"),
        ("score", [], "score: is empty; give one at least"),
        ("score.0.stage", "other", "score.0.stage: there is no stage 'other', only pre, tune"),
        ("score", [{"stage": "pre"}, {"stage": "pre"}], "score: the name 'pre' is there twice"),
        ("stages.0.documents", ..., "score.0.documents: neither this entry nor its stage names documents"),
        ("index", [{"stage": "other"}], "index.0.stage: there is no stage 'other', only pre, tune"),
        ("index", [{"stage": "pre"}, {"stage": "pre"}], "index: the name 'pre' is there twice"),
        ("index", [{"stage": "pre", "rank": 0}], "index.0.rank: "),
        ("index", [{"stage": "pre", "dtype": "int4"}], "index.0.dtype: "),
        ("top", 0, "top: "),
        ("cluster.dtype", "float16", "cluster.dtype: "),
        ("cluster.offload", True, "cluster.offload: only a sharded model can be offloaded; set `ranks_per_replica`"),
        ("cluster", {"offload": True, "ranks_per_replica": 0}, "cluster.ranks_per_replica: "),
        (
            "cluster",
            {"gpus_per_rank": 0.5, "ranks_per_replica": 2},
            "cluster.gpus_per_rank: ranks that hold one model together need a GPU each, not 0.5; set it to 1 or",
        ),
        ("cluster.directions_memory", 0, "cluster.directions_memory: input should be greater than 0"),
        ("cluster.directions_memory", "much", "cluster.directions_memory: "),
        ("cluster.replicas", {"min": 3, "max": 2}, "cluster.replicas: min 3 is larger than max 2"),
    ],
)
def test_a_fault_is_one_line_with_its_key(key: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_run(changed(key, value), "run.yaml")
    line = str(error.value)
    assert line.startswith(f"run.yaml: {message}") and "\n" not in line


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("stages.0.damping", 0.01, "stages.0.damping: give {absolute: 0.01} or {relative: 0.01}, not 0.01"),
        ("stages.0.damping", "high", "stages.0.damping: give a mapping of absolute, relative, not 'high'"),
        ("stages.0.damping", None, "stages.0.damping: is empty; give a mapping of absolute, relative"),
        ("stages.1.response", "proximal", "stages.1.response: give {kind: proximal}, not 'proximal'"),
        ("stages.1.response", "unrolled", "stages.1.response: give {kind: unrolled, …}, not 'unrolled'"),
        (
            "stages.1.response",
            1,
            "stages.1.response: give a mapping with a kind: proximal, unrolled or identity, not 1",
        ),
        (
            "stages.1.response",
            {"alpha": 1},
            "stages.1.response.kind: is missing; give one of proximal, unrolled, identity",
        ),
        (
            "stages.1.response",
            {"kind": "x"},
            "stages.1.response.kind: give one of proximal, unrolled, identity, not 'x'",
        ),
        (
            "stages.1.response",
            {"kind": "proximal", "alpha": 2},
            "stages.1.response.alpha: give {absolute: 2} or {relative: 2}, not 2",
        ),
        (
            "score.0.responses",
            {"dpo": {"kind": "proximal", "alpha": 2}},
            "score.0.responses.dpo.alpha: give {absolute: 2} or {relative: 2}, not 2",
        ),
        ("stages.0.objective", "dpoo", "stages.0.objective.kind: give one of classification, dpo, not 'dpoo'"),
        ("stages.0.fit", 9, "stages.0.fit: give {documents: 9} or {max_tokens: 9}, not 9"),
        ("stages.0.documents", "a.jsonl", "stages.0.documents: give {path: a.jsonl, …}, not 'a.jsonl'"),
        ("stages", "pre", "stages: give [{name: pre, …}], not 'pre'"),
        ("stages", {"name": "pre"}, "stages: give a list, if only of one, not {'name': 'pre'}"),
        ("score", ["pre"], "score.0: give {stage: pre, …}, not 'pre'"),
        ("score.0.candidates", "bm25", "score.0.candidates: give {method: bm25} or {path: bm25}, not 'bm25'"),
        ("score.0.responses", "x", "score.0.responses: give a mapping, not 'x'"),
        ("modules", "*.mlp.*", "modules: give ['*.mlp.*'], not '*.mlp.*'"),
        ("detail", True, "detail: give a mapping of tokens, modules, curvature_norm, normalised, norm, not True"),
        ("stages.0.damping", {"relative": True}, "stages.0.damping: give `relative` a number, not true"),
        ("stages.0.fit", {"documents": False}, "stages.0.fit: give `documents` a number, not false"),
        ("queries.rank", True, "queries: give `rank` a number, not true"),
        ("top", True, "give `top` a number, not true"),
        ("cluster.factor_memory", True, "cluster: give `factor_memory` a number, not true"),
        ("cluster.replicas", True, "cluster.replicas: give a number, or a mapping of min and max, not True"),
        ("cluster.replicas", {"min": True}, "cluster.replicas: give `min` a number, not true"),
        ("cluster.gpus_per_rank", float("inf"), "cluster.gpus_per_rank: input should be a finite number, not inf"),
        ("cluster.gpus_per_rank", 1.5, "cluster.gpus_per_rank: 1.5 is over 1 and no whole number; a rank has a part"),
        ("queries.prompt", "", "queries.prompt: string should have at least 1 character, not ''"),
        ("queries.completion", [], "queries.completion: input should be a valid string, not []"),
        ("cluster", 4, "cluster: give a mapping of replicas, ranks_per_replica, gpus_per_rank, "),
        ("cluster.replicas", "many", "cluster.replicas: give a number, or a mapping of min and max, not 'many'"),
        ("seed", "x" * 300, "seed: input should be a valid integer, unable to parse string as an integer, not 'xxx"),
    ],
)
def test_a_value_of_another_kind_is_told_what_to_give(key: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_run(changed(key, value), "run.yaml")
    line = str(error.value)
    assert line.startswith(f"run.yaml: {message}") and "\n" not in line and len(line) < 250


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": ..., "query": {"path": "q"}}, "query: unknown key; is `queries` meant?"),
        ({"stages.0.model": ..., "stages.0.modell": "a"}, "stages.0.modell: unknown key; is `model` meant?"),
        (
            {"stages.1.response": {"kind": "proximal", "alfa": 1}},
            "stages.1.response.alfa: unknown key; is `alpha` meant?",
        ),
        ({"seed": "x", "colour": "blue"}, "colour: unknown key"),
    ],
)
def test_an_unknown_key_comes_first_with_what_it_is_near(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_run(changed_all(changes))
    assert str(error.value) == f"run description: {message}"


CG = {"kind": "cg", "iterations": 5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages.1.solver": {"kind": "lissa"}}, "stages.1.solver.kind: give one of ekfac, cg, not 'lissa'"),
        ({"stages.1.solver": {"kind": "ekfac", "iterations": 3}}, "stages.1.solver.iterations: unknown key"),
        ({"stages.1.solver": CG | {"iterations": 0}}, "stages.1.solver.iterations: "),
        ({"stages.1.solver": CG | {"tolerance": 1}}, "stages.1.solver.tolerance: "),
        ({"stages.1.solver": CG, "stages.1.response": {"kind": "identity"}}, "stages.1.solver: the response of 'tune'"),
        (
            {"stages.0.solver": CG, "stages.0.response": {"kind": "unrolled", "rate": 0.1, "steps": 3}},
            "stages.0.solver: cg solves linear systems, and an unrolled response (stages.0.response) of 'pre'",
        ),
        (
            {
                "stages.1.solver": CG,
                "score.0.responses": {"tune": {"kind": "unrolled", "rate": 0.1, "steps": 3}},
            },
            "stages.1.solver: cg solves linear systems, and an unrolled response (score.0.responses) of 'tune'",
        ),
        (
            {"stages.0.solver": CG | {"documents": 9}, "stages.0.fit": {"documents": 8}},
            "stages.0.solver.documents: 9 is more than the 8 documents of fit",
        ),
        ({"stages.0.solver": CG, "cluster.ranks_per_replica": 2}, "stages.0.solver: cg needs forward-mode"),
        ({"stages.0.solver": CG, "cluster.dtype": "bfloat16"}, "stages.0.solver: bfloat16 rounds too coarsely"),
    ],
)
def test_what_conjugate_gradients_cannot_solve_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_run(changed_all(changes), "run.yaml")
    line = str(error.value)
    assert line.startswith(f"run.yaml: {message}") and "\n" not in line


def test_a_solved_stage_may_be_left_out_by_an_entry() -> None:
    run = parse_run(changed_all({"stages.1.solver": CG, "score.0.responses": {"tune": {"kind": "identity"}}}))
    solver = run.stages[1].solver
    assert isinstance(solver, CgSolver) and (solver.iterations, solver.documents, solver.tolerance) == (5, None, 0.3)
    assert run.stages[0].solver == EkfacSolver()


def test_shards_may_be_offloaded() -> None:
    assert parse_run(changed("cluster", {"ranks_per_replica": 2, "offload": True})).cluster.offload


def test_rank_and_energy_exclude_each_other() -> None:
    with pytest.raises(UserError, match="queries: give `rank` or `energy`, not both"):
        parse_run(changed("queries", {"path": "q", "rank": 2, "energy": 0.9}))


def test_a_file_is_the_same_run_as_its_mapping(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(DESCRIPTION))
    assert load_run(path) == parse_run(DESCRIPTION)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"a: [", "not valid YAML"),
        (
            b"\xff\xfe\xfa",
            "not valid YAML: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte; ",
        ),
        (b"- a", "not a run description"),
        (b"", "not a run description"),
        (b"!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_a_file_that_holds_no_run_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_run(path)
    assert str(error.value).startswith(f"{path}: {message}") and "\n" not in str(error.value)


def written(folder: Path, more: str, start: str = yaml.safe_dump(DESCRIPTION)) -> Path:
    path = folder / "run.yaml"
    path.write_text(f"{start}{more}")
    return path


REPEATED = [
    ("score:\n- stage: tune\n", "line 18: the key 'score' is there already in line 4; leave one out"),
    ("detail: {tokens: true,\n  tokens: false}", "line 19: the key 'tokens' is there already in line 18"),
    ("top: 3\n'top': 4", "line 19: the key 'top' is there already in line 18; leave"),
]


@pytest.mark.parametrize(("more", "message"), REPEATED)
def test_a_key_that_is_there_twice_is_named_with_both_lines(tmp_path: Path, more: str, message: str) -> None:
    path = written(tmp_path, more)
    with pytest.raises(UserError) as error:
        load_run(path)
    assert str(error.value).startswith(f"{path}: {message}") and "\n" not in str(error.value)


def test_a_merged_key_may_be_set_anew(tmp_path: Path) -> None:
    merged = """
run_dir: out
stages:
- &pre {name: pre, model: a, documents: &corpus {path: a.jsonl, text: text}}
- &tune {<<: *pre, name: tune, model: b, documents: {<<: *corpus, path: b.jsonl}}
- {<<: [*tune, *pre], name: more}
- {<<: *tune, <<: *pre, name: last}
queries: {path: q.jsonl}
score: [{stage: pre}]
"""
    path = written(tmp_path, merged, "")
    stages = load_run(path).stages
    assert [stage.name for stage in stages] == ["pre", "tune", "more", "last"]
    assert [stage.model for stage in stages] == ["a", "b", "b", "a"]
    assert stages[2].documents == stages[1].documents
    assert stages[1].documents is not None and stages[1].documents.path == "b.jsonl"


NO_VALUES = ["2024-13-01", "0x_", "!!int abc", "!!int ''", "!!bool abc", "!!timestamp abc", "!!float abc", "9" * 5000]


@pytest.mark.parametrize("value", NO_VALUES)
def test_a_value_that_is_none_of_its_type_is_one_line(tmp_path: Path, value: str) -> None:
    path = written(tmp_path, f"top: {value}\n")
    with pytest.raises(UserError) as error:
        load_run(path)
    line, shown = str(error.value), value.rpartition(" ")[2].strip("'")[:50]
    assert line.startswith(f"{path}: not valid YAML: line 18: {shown!r} is no ") and "\n" not in line
    assert line.endswith("; put it in quotes if it is text") and len(line) < len(str(path)) + 150


def test_yaml_that_is_nested_too_deeply_is_one_line(tmp_path: Path) -> None:
    path = written(tmp_path, f"top: {'[' * 5000}{']' * 5000}\n")
    with pytest.raises(UserError) as error:
        load_run(path)
    assert str(error.value) == f"{path}: not valid YAML: nested too deeply"


def test_an_index_keeps_no_tokens() -> None:
    indexed = changed("score.0.index", "other") | {"detail": {"tokens": True}}
    with pytest.raises(UserError, match=r"detail\.tokens: score\.0 reads an index, which keeps no tokens"):
        parse_run(indexed)
    assert parse_run(indexed | {"detail": {"modules": True}}).detail.modules


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"score.0.index": "other"},
            "detail.curvature_norm: score.0 reads an index, which keeps too little of a gradient for this norm; leave "
            "one out",
        ),
        (
            {"score.0.responses": {"pre": {"kind": "identity"}}},
            "detail.curvature_norm: in score.0 the response of 'pre' is identity, and the norm is that of a damped "
            "inverse; leave one out",
        ),
        (
            {"stages.0.response": {"kind": "unrolled", "rate": 0.1, "steps": 5}},
            "detail.curvature_norm: in score.0 the response of 'pre' is unrolled, and the norm is",
        ),
    ],
)
def test_a_norm_in_the_inverse_curvature_wants_one(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_run(changed_all(changes | {"detail": {"curvature_norm": True}}))
    assert str(refused.value).startswith(f"run description: {message}") and "\n" not in str(refused.value)
    assert not parse_run(changed_all(changes)).detail.curvature_norm


def test_a_later_stage_left_out_leaves_the_norm_in_the_inverse_curvature() -> None:
    left_out = {"score.0.responses": {"tune": {"kind": "identity"}}, "detail": {"curvature_norm": True}}
    assert parse_run(changed_all(left_out)).detail.curvature_norm


def test_a_score_per_norm_needs_the_norm() -> None:
    assert not parse_run(changed("detail", {"norm": False})).detail.norm
    with pytest.raises(
        UserError, match=r": detail: `normalised` has the score per unit of `norm`; leave `norm: false`"
    ):
        parse_run(changed("detail", {"norm": False, "normalised": True}))
