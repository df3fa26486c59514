"""Groups of maps, of a fit or an index, that are decided anew, since what said how they were is lost: without Ray."""

from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from msif_ray import layout
from msif_ray.cluster import fit as fitting
from msif_ray.cluster import index as indexing
from msif_ray.cluster.fit import FitTask, fit, is_fitted
from msif_ray.cluster.index import IndexPlan, build
from msif_ray.cluster.partials import Coverage, Partial
from msif_ray.config import Documents
from msif_ray.corpus.blocks import CorpusBlocks
from msif_ray.errors import UserError
from msif_ray.store import read_json, save_tensors, write_json

MAPS = {"a": (2, 3), "b": (2, 3), "c": (2, 3)}
ONE_EACH = 1
SUMMED: list[tuple[str, str]] = []
"""The covariances that were asked for: group and inputs."""


@dataclass
class Pool:
    """Sums over one block of so many `documents`, and others that were skipped."""

    documents: int = 1
    skipped: tuple[tuple[str, str], ...] = ()

    def accumulate(self, setup: Any, job: Any, blocks: Any, step: Path, progress: Any, inputs: str = "") -> Coverage:
        if step.name == "covariance":
            SUMMED.append((step.parent.name, inputs))
        block = frozenset({"00000-0000000"})
        return Coverage((Partial(step, (), block, self.documents, 0, 0, self.skipped, inputs),), block)

    def idle(self) -> list[Any]:
        return []


def write_each(function: Any, maps: Any, folder: Path, *_: Any, **__: Any) -> list[float]:
    file = layout.basis_file if function is fitting.write_basis else layout.eigenvalues_file
    for name in maps:
        save_tensors(file(folder, name), {"t": torch.ones(1)})
    return [1.0 for _ in maps]


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FitTask:
    monkeypatch.setattr(fitting, "for_each_map", write_each)
    SUMMED.clear()
    setup = cast(Any, type("Setup", (), {"dtype": "float32", "stage": "s"}))
    return FitTask(setup, "sampled", cast(Any, None), 4, tmp_path, MAPS, ONE_EACH, None, {})


def asked(task: FitTask) -> list[tuple[str, str]]:
    """What is summed anew by a driver that comes to this."""
    SUMMED.clear()
    fit(task, cast(Any, Pool()), lambda _: nullcontext(cast(Any, None)), print)
    return list(SUMMED)


def test_sums_over_other_maps_under_a_groups_number_do_not_count(task: FitTask) -> None:
    singles = dict(asked(task))
    assert len(singles) == len(set(singles.values())) == 3 and "" not in singles.values()
    for name in MAPS:
        layout.basis_file(task.folder, name).unlink()
    layout.groups(task.folder).unlink()
    ((number, inputs),) = asked(replace(task, memory=10**9))
    assert number in singles and inputs not in singles.values()


def test_sums_over_the_same_maps_count_on(task: FitTask) -> None:
    before = asked(task)
    for name in MAPS:
        layout.basis_file(task.folder, name).unlink()
    layout.groups(task.folder).unlink()
    assert asked(task) == before


def test_a_groups_record_of_other_maps_is_not_believed(task: FitTask) -> None:
    asked(task)
    layout.groups(task.folder).unlink()
    layout.factors_manifest(task.folder).unlink()
    asked(replace(task, memory=10**9))
    assert is_fitted(task.folder)
    assert read_json(layout.group_record(task.folder, 0))["mean_eigenvalues"].keys() == MAPS.keys()


def test_sums_of_a_run_begun_before_groups_had_checksums_count_on(task: FitTask) -> None:
    write_json(layout.groups(task.folder), {"factor_memory": 1, "groups": [["a", "b"], ["c"]]})
    assert asked(task) == [("0000", ""), ("0001", "")]


def test_a_stage_of_which_no_document_can_be_used_is_named(task: FitTask) -> None:
    documents = Documents(path="c/*.parquet", text="text")
    blocks = CorpusBlocks((), (), documents, 4, "stages.0.documents")
    pool = Pool(0, (("a", "text is null"), ("b", "fewer than two tokens"), ("c", "text is null")))
    with pytest.raises(UserError) as error:
        fit(replace(task, blocks=blocks), cast(Any, pool), lambda _: nullcontext(cast(Any, None)), print)
    assert str(error.value) == (
        "stages.0.documents.path: c/*.parquet: no document of stage 's' can be used: 3 were skipped, most often "
        "because: text is null; name other documents or columns"
    )


def test_groups_of_other_maps_are_refused(task: FitTask) -> None:
    for groups in ([["a", "b"]], [["a", "b"], ["b", "c"]], [["a", "b", "c", "d"]]):
        write_json(layout.groups(task.folder), {"groups": groups})
        with pytest.raises(
            UserError, match=r"groups\.json: its groups are not of this run's maps, each once; delete it"
        ):
            asked(task)


def test_a_groups_record_of_another_stage_is_named(task: FitTask) -> None:
    asked(task)
    path = layout.group_record(task.folder, 0)
    write_json(path, read_json(path) | {"stage": "another"})
    layout.factors_manifest(task.folder).unlink()
    with pytest.raises(UserError, match=f"^{path}: in the wrong place: its stage is another, not {task.folder.name}; "):
        asked(task)


FINISHED: dict[str, Any] = {
    "model_sha256": "",
    "computed_in": "",
    "corpus": {},
    "maps": {},
    "groups": [["a"], ["b"], ["c"]],
    "documents_per_block": 1,
}
"""What the manifest of an index says, as far as it is read here."""


class StoppedError(Exception):
    pass


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> IndexPlan:
    """An index whose driver ended in its first pass, with a block written."""

    def stream(task: Any, *_: Any) -> None:
        save_tensors(layout.index_block(task.folder, task.blocks), {"of": torch.tensor(len(task.job.tracked))})
        raise StoppedError

    def metrics(_: Any, maps: list[str], folder: Path, *__: Any, **___: Any) -> None:
        for name in maps:
            save_tensors(layout.metric_file(folder, name), {"of": torch.zeros(1)})

    monkeypatch.setattr(indexing, "for_each_map", metrics)
    monkeypatch.setattr(indexing, "stream", stream)
    monkeypatch.setattr(indexing, "bases_checksum", lambda factors, maps: factors.name)
    setup = cast(Any, type("Setup", (), {"dtype": "float32"}))
    folder, factors = tmp_path / "index", tmp_path / "factors"
    plan = IndexPlan(setup, cast(Any, "first"), folder, factors, MAPS, {}, 4, "float16", ONE_EACH, {})
    begin(plan)
    return plan


def begin(plan: IndexPlan, block: str = "first") -> list[str]:
    """The blocks of the first group that are there when a driver that comes to this index has done another."""
    with suppress(StoppedError):
        build(replace(plan, blocks=cast(Any, block)), cast(Any, Pool()), lambda _: nullcontext(cast(Any, None)))
    return sorted(path.stem for path in layout.index_group(plan.folder, 0).iterdir())


def test_blocks_of_an_index_that_has_lost_its_groups_do_not_count(plan: IndexPlan) -> None:
    assert begin(plan, "second") == ["block-first", "block-second"]
    layout.groups(plan.folder).unlink()
    assert begin(replace(plan, memory=10**9), "third") == ["block-third"]


def test_a_finished_index_says_what_its_groups_were(plan: IndexPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    layout.groups(plan.folder).unlink()
    write_json(layout.index_manifest(plan.folder), FINISHED)
    monkeypatch.setattr(indexing, "missing_files", lambda *_: True)
    assert begin(replace(plan, memory=10**9), "second") == ["block-first", "block-second"]
    assert read_json(layout.groups(plan.folder)) == {"groups": [["a"], ["b"], ["c"]]}


def test_blocks_go_with_a_lost_metric_of_factors_that_were_fitted_anew(plan: IndexPlan) -> None:
    """They are in the coordinates of its bases, and those of the new ones are others."""
    anew = replace(plan, factors=plan.folder.parent / "anew")
    assert begin(anew, "second") == ["block-first", "block-second"]  # with the metrics that it has
    layout.metric_file(plan.folder, "a").unlink()
    assert begin(plan, "third") == ["block-first", "block-second", "block-third"]
    layout.metric_file(plan.folder, "a").unlink()
    assert begin(anew, "fourth") == ["block-fourth"]


@pytest.mark.parametrize("said", [{"bases": "factors"}, {}], ids=["this version's", "an earlier version's"])
def test_a_finished_index_that_lost_its_groups_and_a_metric_is_not_mended_by_other_factors(
    plan: IndexPlan, monkeypatch: pytest.MonkeyPatch, said: dict[str, str]
) -> None:
    """Its blocks are in the coordinates of bases that are gone; of an earlier version's that is not known."""
    write_json(layout.index_manifest(plan.folder), FINISHED | said)
    monkeypatch.setattr(indexing, "missing_files", lambda *_: True)
    layout.groups(plan.folder).unlink()
    layout.metric_file(plan.folder, "a").unlink()
    assert begin(replace(plan, factors=plan.folder.parent / "anew"), "second") == ["block-second"]


def test_a_finished_index_that_lost_its_groups_and_a_metric_is_mended_by_the_same_factors(
    plan: IndexPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(layout.index_manifest(plan.folder), FINISHED | {"bases": "factors"})
    monkeypatch.setattr(indexing, "missing_files", lambda *_: True)
    layout.groups(plan.folder).unlink()
    layout.metric_file(plan.folder, "a").unlink()
    assert begin(plan, "second") == ["block-first", "block-second"]
    assert read_json(layout.groups(plan.folder)) == {"groups": FINISHED["groups"], "bases": "factors"}
