"""A block of an index, in one process: its scores are the package's exact ones and the dense reference's."""

import gc
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import reference
import torch
from influence import pipeline

from msif_ray import layout
from msif_ray.cluster import indexed
from msif_ray.cluster.directions import save_shard
from msif_ray.cluster.index import IndexJob, IndexTask
from msif_ray.cluster.index_metric import load_metric, write_metric
from msif_ray.cluster.indexed import IndexBlock, indexed_scorers
from msif_ray.cluster.outcomes import Outcome
from msif_ray.corpus.reader import Block
from msif_ray.corpus.windows import Skipped
from msif_ray.errors import UserError
from msif_ray.influence.queries import truncate
from msif_ray.influence.scoring import Scorer
from msif_ray.store import save_tensors, write_json

QUERIES = models.random_documents(7, 3, words=(2, 9), completions=True, prefix="query")
SMALL = {"strength": 1e-3, "damping": 1e-3}
FULL = 64  # over every map's dimensions here


def two_stages(kind: str) -> list[reference.StageSpec]:
    tokenizer = models.build_tokenizer()
    first = models.build_model(kind, 0)
    texts = models.random_documents(0, 20, words=(2, 40))  # in up to four windows
    answers = models.random_documents(1, 20, words=(2, 10), completions=True)
    return [
        reference.StageSpec("pretrain", first, tokenizer, texts, max_tokens=12, **SMALL),
        reference.StageSpec("tune", models.perturb(first, 1), tokenizer, answers, max_tokens=16, **SMALL),
    ]


@pytest.fixture(scope="module", params=("gpt_neox", "gpt2"))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Stages, their factors, and the scored stage's on storage."""
    stages = two_stages(request.param)
    factors = [pipeline.fit(stage).factors for stage in stages]
    folder = tmp_path_factory.mktemp("factors")
    for name, factor in factors[0].items():
        basis = {"activation_basis": factor.basis.activations, "gradient_basis": factor.basis.gradients}
        save_tensors(layout.basis_file(folder, name), basis)
        save_tensors(layout.eigenvalues_file(folder, name), {"eigenvalues": factor.eigenvalues})
    return SimpleNamespace(stages=stages, factors=factors, folder=folder, maps=list(factors[0]))


def build(
    case: Any, folder: Path, rank: int = FULL, dtype: str = "float64", damping: float = 0.1, tokens: int = 150
) -> IndexTask:
    """Writes the scored stage's documents as one block."""
    index, stage = folder / "index", case.stages[0]
    for name in case.maps:
        strength = damping * case.factors[0][name].mean_eigenvalue
        write_metric(name, index, case.folder, {name: strength})
    job = IndexJob(index, rank, getattr(torch, dtype), tuple(case.maps))
    work = job.start(case.maps, torch.device("cpu"))
    for captured in pipeline.captures(stage, stage.documents, tokens):
        work.add(captured)
    encoded, _ = pipeline.encode_rows(stage, stage.documents)
    outcome = Outcome({e.document_id: len(e.ids) for e in encoded}, (Skipped("short", "why"),), 0)
    task = IndexTask(SimpleNamespace(model="model"), job, None, layout.index_group(index, 0))  # type: ignore[arg-type]
    task.write(Block("00000-0000000", ()), outcome, work.take())
    return task


def read(case: Any, folder: Path, dtype: torch.dtype = torch.float64) -> IndexBlock:
    return IndexBlock(folder / "index", [case.maps], "00000-0000000", dtype)


def write_queries(folder: Path, carried: dict[str, torch.Tensor], rank: int | None = None) -> Path:
    """The queries as a run has them on storage, a shard each; with `rank`, at low rank."""
    cut, maps = [(n, n + 1) for n in range(len(QUERIES))], {}
    for name, matrices in carried.items():
        for n, stop in cut:
            each, kept = truncate(matrices[n:stop], rank)
            save_shard(layout.direction_file(folder, name, (n, stop)), each, torch.tensor([rank or 1]), kept, {})
        maps[name] = {"shape": list(matrices.shape[1:]), "vectors": [rank] * len(cut)}
    write_json(layout.directions_manifest(folder), {"shards": cut, "itemsize": 8, "maps": maps})
    return folder


def scores(
    case: Any, folder: Path, carried: dict[str, torch.Tensor], rank: int | None = None, memory: int = 2**30
) -> Any:
    """As `pipeline.score` gives them, within the memory; with `rank`, directions of low rank."""
    block, queries = read(case, folder), write_queries(folder / "queries", carried, rank)
    found = block.score(indexed_scorers([queries], case.maps, torch.device("cpu"), memory, folder / "index"))
    return {
        (query["id"], window.document_id): (
            float(window.scores[q]),
            math.sqrt(window.squared_norm),
            block.outcome.tokens[window.document_id],
        )
        for window in found
        for q, query in enumerate(QUERIES)
    }


def error(found: Any, wanted: Any) -> float:
    assert found.keys() == wanted.keys()
    assert all(found[pair][2] == wanted[pair][2] for pair in wanted)
    columns = [torch.tensor([[side[pair][i] for pair in wanted] for side in (found, wanted)]) for i in (0, 1)]
    return max(float((got - want).abs().max() / want.abs().max()) for got, want in columns)


@pytest.mark.parametrize("tokens", (pipeline.TOGETHER, 60, pipeline.ALONE))
def test_full_rank_is_the_exact_path(case: Any, tmp_path: Path, tokens: int) -> None:
    """However a document's windows are spread over batches."""
    build(case, tmp_path, tokens=tokens)
    carried = pipeline.carry(case.stages, case.factors, QUERIES)
    wanted, _ = pipeline.score(pipeline.dense(carried), case.stages[0], QUERIES, case.stages[0].documents)
    for memory in (2**30, 20_000, 1):  # rotated once, some of them or all for every block
        assert error(scores(case, tmp_path, carried, memory=memory), wanted) < 1e-9
    assert [skip.document_id for skip in read(case, tmp_path).outcome.skipped] == ["short"]


def test_full_rank_is_the_dense_reference(case: Any, tmp_path: Path) -> None:
    build(case, tmp_path)
    names = reference.tracked_names(case.stages[-1].model)
    fits = [reference.fit(stage, names) for stage in case.stages]
    wanted, _ = reference.scores(case.stages, QUERIES, case.stages[0].documents, 0, names, fits)
    carried = pipeline.carry(case.stages, case.factors, QUERIES)
    assert error(scores(case, tmp_path, carried), wanted) < 1e-9


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "damping": ({"damping": 0.5}, {}),
    "alpha": ({}, {"strength": 0.3}),
    "identity": ({"scored_response": "identity"}, {"response": "identity"}),
    "unrolled": ({"response": "unrolled", "rate": 0.01, "steps": 3}, {"response": "unrolled", "rate": 0.1, "steps": 5}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_queries_may_have_other_responses_than_the_index(case: Any, tmp_path: Path, change: str) -> None:
    build(case, tmp_path, damping=0.1)
    stages = [replace(stage, **changes) for stage, changes in zip(case.stages, CHANGES[change], strict=True)]
    carried = pipeline.carry(stages, case.factors, QUERIES)
    wanted, _ = pipeline.score(pipeline.dense(carried), stages[0], QUERIES, stages[0].documents)
    assert error(scores(case, tmp_path, carried), wanted) < 1e-9


def test_directions_of_low_rank(case: Any, tmp_path: Path) -> None:
    build(case, tmp_path)
    carried = pipeline.carry(case.stages, case.factors, QUERIES)
    directions = {name: truncate(each, 3)[0] for name, each in carried.items()}
    wanted, _ = pipeline.score(directions, case.stages[0], QUERIES, case.stages[0].documents)
    for memory in (2**30, 1):
        assert error(scores(case, tmp_path, carried, rank=3, memory=memory), wanted) < 1e-9


def tensor_bytes() -> int:
    """Of all tensors of this process."""
    found = (each.untyped_storage() for each in gc.get_objects() if type(each) is torch.Tensor)
    return sum({each.data_ptr(): each.nbytes() for each in found}.values())


def test_directions_are_in_memory_once(case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as they were carried back and in the coordinates of the index."""
    build(case, tmp_path)
    carried = pipeline.carry(case.stages, case.factors, QUERIES)
    total, queries = sum(each.nbytes for each in carried.values()), write_queries(tmp_path / "queries", carried)
    before, held = tensor_bytes(), []

    def loaded(folder: Path, name: str, device: torch.device) -> Any:
        if name == case.maps[-1]:
            held.append(tensor_bytes() - before)
        return load_metric(folder, name, device)

    monkeypatch.setattr(indexed, "load_metric", loaded)
    indexed_scorers([queries], case.maps, torch.device("cpu"), 2**30, tmp_path / "index")
    assert len(held) == 1 and 0 < held[0] < total


def test_fewer_ranks_and_bits_cost_agreement(case: Any, tmp_path: Path) -> None:
    carried = pipeline.carry(case.stages, case.factors, QUERIES)
    wanted, _ = pipeline.score(pipeline.dense(carried), case.stages[0], QUERIES, case.stages[0].documents)
    exact = torch.tensor([score for score, _, _ in wanted.values()])
    lost = []
    for name, rank, dtype in (("a", 1, "float64"), ("b", 4, "float64"), ("c", FULL, "int8"), ("d", FULL, "float16")):
        build(case, tmp_path / name, rank, dtype)
        found = scores(case, tmp_path / name, carried)
        assert all(found[pair][1:] == pytest.approx(wanted[pair][1:], rel=1e-12) for pair in wanted)  # norms are exact
        lost.append(float((torch.tensor([found[pair][0] for pair in wanted]) - exact).norm() / exact.norm()))
    assert lost[0] > lost[1] > lost[2] > lost[3]
    assert lost[2] < 0.05 and lost[3] < 2e-3
    files = [layout.index_block(tmp_path / n / "index" / "0000", "00000-0000000").stat().st_size for n in "bcd"]
    assert files[2] > 1.5 * files[1]


@pytest.mark.parametrize("side", [0, 1], ids=["activation", "gradient"])
def test_a_gradient_that_is_not_finite_names_its_document(case: Any, tmp_path: Path, side: int) -> None:
    task = build(case, tmp_path, rank=2)
    work = task.job.start(case.maps, torch.device("cpu"))
    stage = case.stages[0]
    for captured in pipeline.captures(stage, stage.documents[:3], pipeline.TOGETHER):
        captured.vectors(case.maps[0])[side][0, 0, 0] = float("inf")
        work.add(captured)
        at_fault = captured.batch.keys[0].document_id
    outcome = Outcome({document["id"]: 1 for document in stage.documents[:3]}, (), 0)
    with pytest.raises(UserError, match=f"^model: a gradient is not finite, of document '{at_fault}'$"):
        task.write(Block("00000-0000000", ()), outcome, work.take())


def test_a_block_without_a_document_that_counts(case: Any, tmp_path: Path) -> None:
    task = build(case, tmp_path)
    task.write(Block("00000-0000000", ()), Outcome({}, (Skipped("a", "text is null"),), 0), [])
    block = read(case, tmp_path)
    assert block.outcome == Outcome({}, (Skipped("a", "text is null"),), 0)
    assert block.score([Scorer({})]) == []


def test_a_damaged_file_is_named(case: Any, tmp_path: Path) -> None:
    build(case, tmp_path)
    path = layout.index_block(tmp_path / "index" / "0000", "00000-0000000")
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=rf"^{path} is damaged: .*; delete it, and run `msif index`") as refused:
        block = read(case, tmp_path)
        for name in case.maps:
            block.vectors(name)
    assert "\n" not in str(refused.value)


def test_a_block_in_the_place_of_another_is_named(case: Any, tmp_path: Path) -> None:
    """Of the same run, so that its checksums fit."""
    task, index = build(case, tmp_path), tmp_path / "index"
    other = replace(task, folder=layout.index_group(index, 1))
    other.write(Block("00000-0000000", ()), Outcome({}, (Skipped("a", "text is null"),), 0), [])
    other.write(Block("00000-0000001", ()), Outcome({}, (), 0), [])

    def refusal(groups: Any, block: str) -> str:
        with pytest.raises(UserError) as refused:
            IndexBlock(index, groups, block, torch.float64)
        return str(refused.value)

    path = layout.index_block(index / "0000", "00000-0000001")
    path.write_bytes(layout.index_block(index / "0000", "00000-0000000").read_bytes())
    where = "is in the wrong place: its block is 00000-0000000, not 00000-0000001; delete it, and run `msif index`"
    assert refusal([case.maps], "00000-0000001").startswith(f"{path} {where}")
    of_others = "is in the wrong place: it is of other documents or other maps; delete it, and run `msif index`"
    path = layout.index_block(index / "0001", "00000-0000000")
    assert refusal([case.maps[:1], case.maps[1:]], "00000-0000000").startswith(f"{path} {of_others}")
    path = layout.index_block(index / "0000", "00000-0000000")
    assert refusal([["of another group"]], "00000-0000000").startswith(f"{path} {of_others}")


def test_files_of_another_stages_index_are_named(case: Any, tmp_path: Path) -> None:
    """Of the same corpus and maps."""
    build(case, tmp_path)
    other = (tmp_path / "index").rename(tmp_path / "another")
    with pytest.raises(UserError, match=r"block-\S+ is in the wrong place: its index is index, not another; delete it"):
        IndexBlock(other, [case.maps], "00000-0000000", torch.float64)
    with pytest.raises(UserError, match=rf"{case.maps[0]}\.\S+ is in the wrong place: its index is index, not another"):
        load_metric(other, case.maps[0], torch.device("cpu"))


def test_a_metric_in_the_place_of_another_is_named(case: Any, tmp_path: Path) -> None:
    build(case, tmp_path)
    one, other = (layout.metric_file(tmp_path / "index", name) for name in case.maps[:2])
    one.write_bytes(other.read_bytes())
    message = f"{one} is in the wrong place: its map is {case.maps[1]}, not {case.maps[0]}; delete it, and run `msif "
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        load_metric(tmp_path / "index", case.maps[0], torch.device("cpu"))
