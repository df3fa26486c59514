"""Queries carried back in chunks, written in shards and scored within a stated memory: the plain numbers."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import models
import pyarrow.parquet as pq
import pytest
import reference
import torch
from cluster import runs
from influence import pipeline

from msif_ray import layout
from msif_ray.cluster import carry, directions, partials
from msif_ray.cluster.carry import write_directions
from msif_ray.cluster.directions import Shard, shards
from msif_ray.cluster.outcomes import Outcome
from msif_ray.cluster.partials import Coverage
from msif_ray.cluster.passage import CarryTask, Gradients
from msif_ray.cluster.queries import query_blocks
from msif_ray.config import Run, parse_run
from msif_ray.corpus.reader import Document
from msif_ray.corpus.windows import to_batch
from msif_ray.errors import UserError
from msif_ray.influence.capture import Capture, Captured
from msif_ray.influence.directions import Directions, LowRankDirections
from msif_ray.influence.modules import find_linear_maps
from msif_ray.influence.queries import query_tokens, truncate
from msif_ray.influence.scoring import Scorer
from msif_ray.paths import path_of
from msif_ray.store import load_tensors, read_json, save_tensors, write_json

CLOSE = {"rtol": 1e-12, "atol": 1e-13}
CPU = torch.device("cpu")
QUERIES = models.random_documents(3, 11, (3, 6), completions=True, prefix="query")
NAMES = tuple(query["id"] for query in QUERIES)


class World:
    """A fitted pair on storage, its queries' gradients as replicas write them, and what the plain path makes of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stages = [
            reference.StageSpec(name, models.build_model("gpt_neox", seed), models.build_tokenizer(), documents)
            for name, seed, documents in (("pretrain", 5, runs.BASE[:14]), ("tune", 6, runs.TUNING))
        ]
        self.maps = {name: m.shape for name, m in find_linear_maps(self.stages[0].model).items()}
        self.factors = [pipeline.fit(stage).factors for stage in self.stages]
        self.carried = pipeline.carry(self.stages, self.factors, QUERIES)
        self.captured = pipeline.captures(self.stages[0], runs.BASE[:14])
        for stage, factors in zip(self.stages, self.factors, strict=True):
            for name, factor in factors.items():
                basis = {"activation_basis": factor.basis.activations, "gradient_basis": factor.basis.gradients}
                save_tensors(layout.basis_file(folder / stage.name, name), basis)
                save_tensors(layout.eigenvalues_file(folder / stage.name, name), {"eigenvalues": factor.eigenvalues})
        self.gradients = self._write_gradients()

    def _write_gradients(self) -> Coverage:
        """Blocks of four queries, every other one in the other of two ranks' files."""
        encoded, _ = pipeline.encode_rows(self.stages[1], QUERIES)
        with Capture(self.stages[1].model, find_linear_maps(self.stages[1].model)) as capture:
            captured = capture.run(to_batch([next(query.windows(len(query.ids))) for query in encoded]))
        tokens = [query_tokens(captured, row) for row in range(len(QUERIES))]
        step = self.folder / "partials"
        names = []
        for start in range(0, len(QUERIES), 4):
            block = f"00000-{start // 4:07d}"
            names.append(block)
            folder = partials.new_folder(step, block)
            for rank in range(2):
                for name in self.maps:
                    part = {}
                    for query in range(start + rank, min(start + 4, len(QUERIES)), 2):
                        part[f"activations/{NAMES[query]}"] = tokens[query][name].activations
                        part[f"gradients/{NAMES[query]}"] = tokens[query][name].gradients
                    save_tensors(layout.part_file(folder, name, rank), part)
            partials.publish(folder, [list(self.maps)] * 2, [(block, Outcome({}, (), 0).counts)], None)
        return Coverage(tuple(partials.read_disjoint(step)), frozenset(names))

    def run(self, **queries: float) -> Run:
        description = runs.two_stages(self.folder, "run")
        description["queries"] |= queries
        description["stages"][0]["damping"] = {"relative": self.stages[0].damping}
        description["stages"][1]["response"]["alpha"] = {"relative": self.stages[1].strength}
        return parse_run(description)

    def write(self, folder: Path, cut: list[Shard], memory: int, **queries: float) -> Path:
        """What the driver does, in this process."""
        factors = {index: self.folder / stage.name for index, stage in enumerate(self.stages)}
        means = {
            index: {name: factor.mean_eigenvalue for name, factor in factors.items()}
            for index, factors in enumerate(self.factors)
        }
        task = CarryTask(self.run(**queries), 0, factors, NAMES, folder, tuple(cut), memory)
        done = {name: write_directions(name, task, Gradients(self.gradients, 2), means) for name in self.maps}
        carry._write_energy(layout.energy_file(folder), NAMES, done)
        maps = {name: carry._summary(self.maps[name], about) for name, about in done.items()}
        write_json(layout.directions_manifest(folder), {"shards": cut, "itemsize": 8, "maps": maps})
        return folder

    def plain(self, **queries: float) -> dict[str, Directions]:
        return {name: truncate(each, **queries)[0] for name, each in self.carried.items()}


def scores(scorers: list[Scorer], captured: list[Captured]) -> torch.Tensor:
    """`[windows, queries]`."""
    return torch.cat([torch.cat([scorer.score(batch)[0] for scorer in scorers], 1) for batch in captured])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    yield World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("queries", [{}, {"rank": 3}, {"rank": 50}, {"energy": 0.9}, {"energy": 0.999999}])
@pytest.mark.parametrize("cut", [[(0, 11)], [(0, 1), (1, 8), (8, 11)], [(n, n + 1) for n in range(11)]])
def test_shards_and_chunks_and_memory_change_no_score(
    world: World, tmp_path: Path, queries: Mapping[str, float], cut: list[Shard]
) -> None:
    plain = world.plain(**queries)
    expected = scores([Scorer(plain)], world.captured)
    folder = world.write(tmp_path, cut, 2**30 if len(cut) < 3 else 1, **queries)
    total = sum(sum(each.bytes.values()) for each in directions.stored_shards(folder, list(world.maps)))
    for memory in (2**30, total, total - 1, total // 2, total // 10, 1):
        loaded = directions.load([folder], list(world.maps), CPU, memory)
        assert sum(loaded.queries) == 11
        assert (loaded.streamed > 0) == (memory < total)
        torch.testing.assert_close(scores(loaded.scorers, world.captured), expected, **CLOSE)
    joined = directions.load([folder, folder], list(world.maps), CPU, total // 3)
    torch.testing.assert_close(scores(joined.scorers, world.captured), torch.cat([expected, expected], 1), **CLOSE)


def test_the_first_scorer_alone_gives_norms_where_they_are_wanted(world: World, tmp_path: Path) -> None:
    folder = world.write(tmp_path, [(n, n + 1) for n in range(11)], 2**30, rank=3)
    _, wanted = Scorer(world.plain(rank=3)).score(world.captured[0])
    for norms in (True, False):
        first, *others = directions.load([folder], list(world.maps), CPU, 1, norms).scorers
        found = first.score(world.captured[0])[1]
        if norms:
            torch.testing.assert_close(found, wanted, **CLOSE)
        else:
            assert found.isnan().all()
        assert len(others) == 10 and not any(scorer.norms for scorer in others)


def test_the_whole_directions_are_the_dense_path(world: World) -> None:
    dense = scores([Scorer(pipeline.dense(world.carried))], world.captured)
    for queries in ({"rank": 10_000}, {"energy": 1.0}):
        torch.testing.assert_close(scores([Scorer(world.plain(**queries))], world.captured), dense, **CLOSE)


def test_what_stays_in_memory_is_laid_out_for_products(world: World, tmp_path: Path) -> None:
    folder = world.write(tmp_path, [(0, 1), (1, 11)], 2**30)
    loaded = directions.load([folder], list(world.maps), CPU, 2**30)
    assert all(each.transposed for each in loaded.scorers[0].directions.values())


def test_no_more_than_the_memory_is_held(world: World, tmp_path: Path) -> None:
    folder = world.write(tmp_path, [(n, min(n + 2, 11)) for n in range(0, 11, 2)], 2**30, energy=0.99)
    maps = list(world.maps)
    stored = directions.stored_shards(folder, maps)
    total = sum(sum(each.bytes.values()) for each in stored)
    largest = max(max(each.bytes.values()) for each in stored)
    for memory in range(6 * largest, total, total // 7):
        loaded = directions.load([folder], maps, CPU, memory)
        resident, streamed = [], []
        for scorer in loaded.scorers:
            lazy = scorer.directions
            assert isinstance(lazy, directions._Lazy) and not scorer._may_keep
            resident += [tensors_bytes(each) for each in lazy.resident.values()]
            streamed += [tensors_bytes(lazy.read(name)) for name in maps if name not in lazy.resident]
        assert sum(resident) + directions.STREAM_COPIES * max(streamed) <= memory
        assert loaded.streamed == sum(streamed)


def tensors_bytes(each: Directions) -> int:
    parts = [each.left, each.right] if isinstance(each, LowRankDirections) else [each.matrix]
    return sum(part.numel() * part.element_size() for part in parts)


def test_token_scores_are_those_of_the_pairs(world: World, tmp_path: Path) -> None:
    folder = world.write(tmp_path, [(0, 5), (5, 11)], 2**30, rank=2)
    whole = Scorer(world.plain(rank=2))
    captured = world.captured[0]
    pairs = [(0, 1), (1, 1), (0, 4), (1, 0)]
    found = directions.load([folder], list(world.maps), CPU, 1).scorers[0].pair_shares(captured, pairs)[0]
    for (row, query), by_token in zip(pairs, found, strict=True):
        torch.testing.assert_close(by_token, whole.pair_shares(captured, [(row, query)])[0][0], **CLOSE)
        torch.testing.assert_close(by_token.sum(), whole.score(captured)[0][row, query], **CLOSE)


def test_what_is_kept_is_recorded_by_map_and_query(world: World, tmp_path: Path) -> None:
    folder = world.write(tmp_path, [(0, 5), (5, 11)], 2**30, energy=0.9)
    rows = pq.read_table(layout.energy_file(folder)).to_pylist()
    assert [(row["map"], row["query_id"]) for row in rows] == [(name, query) for name in world.maps for query in NAMES]
    manifest = read_json(layout.directions_manifest(folder))
    for name in world.maps:
        of_map = [row for row in rows if row["map"] == name]
        _, kept = truncate(world.carried[name], energy=0.9)
        assert [row["energy_kept"] for row in of_map] == pytest.approx(kept.tolist(), rel=1e-12)
        assert min(row["energy_kept"] for row in of_map) == manifest["maps"][name]["energy_kept"]["min"] >= 0.9
        assert max(row["rank"] for row in of_map) == manifest["maps"][name]["rank"]["max"]


def test_shards_that_are_there_are_not_carried_again(world: World, tmp_path: Path) -> None:
    cut = [(0, 5), (5, 11)]
    folder = world.write(tmp_path, cut, 2**30, rank=2)
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    name = next(iter(world.maps))
    lost = layout.direction_file(folder, name, cut[1])
    content = load_tensors(lost)
    lost.unlink()
    world.write(folder, cut, 2**30, rank=2)
    found = load_tensors(lost)
    assert all(torch.equal(found[part], content[part]) for part in ("left", "right", "ranks", "kept"))
    del files[lost]
    assert all(path.stat().st_mtime_ns == at for path, at in files.items())


def test_shards_on_object_storage_are_fetched_once_and_streamed_from_disk(
    world: World, bucket: str, tmp_path: Path
) -> None:
    folder = world.write(path_of(f"s3://{bucket}/directions"), [(0, 5), (5, 11)], 2**30, rank=2)
    expected = scores([Scorer(world.plain(rank=2))], world.captured)
    for memory in (2**30, 1, 1):
        loaded = directions.load([folder], list(world.maps), CPU, memory)
        torch.testing.assert_close(scores(loaded.scorers, world.captured), expected, **CLOSE)
        copies = [path for path in (tmp_path / "cache").glob("*") if path.is_dir()]
        assert len(copies) == (1 if memory == 1 else 0)
    assert len(list(copies[0].rglob("*.safetensors"))) == 2 * len(world.maps)


@pytest.mark.parametrize("memory", [2**30, 1])
def test_a_damaged_or_missing_shard_is_named(world: World, tmp_path: Path, memory: int) -> None:
    folder = world.write(tmp_path, [(0, 5), (5, 11)], 2**30, rank=2)
    path = layout.direction_file(folder, next(iter(world.maps)), (5, 11))
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    for fault in ("damaged", "is not there"):
        with pytest.raises(UserError) as refused:
            scores(directions.load([folder], list(world.maps), CPU, memory).scorers, world.captured)
        message = str(refused.value)
        assert str(path) in message and fault in message and "delete it, and run" in message and "\n" not in message
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("wrong", ["other queries", "other map", "other scores"])
def test_a_shard_in_the_place_of_another_is_named(world: World, tmp_path: Path, wrong: str) -> None:
    """Of the same run, so that its checksums fit, and of as many queries."""
    folder = world.write(tmp_path, [(0, 5), (5, 10), (10, 11)], 2**30, rank=2)
    name, other = list(world.maps)[:2]
    path = layout.direction_file(folder, name, (0, 5))
    if wrong == "other scores":
        world.write(tmp_path / "other", [(0, 5), (5, 11)], 2**30, rank=2)
    of, where = {
        "other queries": ((folder, name, (5, 10)), "queries"),
        "other map": ((folder, other, (0, 5)), "map"),
        "other scores": ((tmp_path / "other", name, (0, 5)), "scores"),
    }[wrong]
    path.write_bytes(layout.direction_file(*of).read_bytes())
    with pytest.raises(UserError, match=rf"^{path} is in the wrong place: its {where} .*; delete it, and run the same"):
        directions.load([folder], list(world.maps), CPU, 2**30)


def test_shards_are_cut_by_what_is_allowed() -> None:
    shapes = {"a": (100, 50), "b": (10, 10)}
    assert shards(130, shapes, 2, 4, None) == [(0, 64), (64, 128), (128, 130)]
    # 5,000 entries of 4 bytes a query where all of it may be kept, 300 at rank 2; eight shards fit.
    assert shards(5, shapes, None, 4, 8 * 40_000) == [(0, 2), (2, 4), (4, 5)]
    assert shards(5, shapes, 2, 4, 8 * 40_000) == [(0, 5)]
    assert shards(2, shapes, None, 4, 1) == [(0, 1), (1, 2)]


def test_query_blocks_are_cut_by_count_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    queries = [Document(str(n), "a", "b", True) for n in range(20)]

    def sizes(lengths: list[int]) -> list[int]:
        return [len(block.documents) for block in query_blocks(queries, lengths, {"a": (3, 2)}, 4)]

    assert sizes([5] * 20) == [8, 8, 4]
    monkeypatch.setattr("msif_ray.cluster.queries.BLOCK_BYTES", 20 * 20)  # of 20 bytes a token
    assert sizes([5] * 20) == [4] * 5
    assert sizes([100, 1, 1, 100, *[1] * 16]) == [1, 2, 1, 8, 8]
