"""Documents of several windows, of which one has a loss that is not finite: as if they were not in the corpus."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import models
import pytest
import ranks
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

from msif_ray import layout
from msif_ray.cluster import fit, rank
from msif_ray.cluster.factors import bases_checksum
from msif_ray.cluster.index import IndexedBatch, IndexJob, IndexTask, _IndexWork
from msif_ray.cluster.indexed import IndexBlock
from msif_ray.cluster.iterates import ProductWork
from msif_ray.cluster.jobs import CorrectionJob, CovarianceJob
from msif_ray.cluster.outcomes import Outcome
from msif_ray.cluster.partials import Coverage, read_disjoint
from msif_ray.cluster.rank import ModelSetup, Rank
from msif_ray.cluster.references import ReferenceJob
from msif_ray.cluster.replica import Destination, Replica
from msif_ray.cluster.room import RankResources
from msif_ray.cluster.score_jobs import LoadedDirections, Shares, _DetailWork, _ScoreWork, _TokenWork
from msif_ray.cluster.sharding import RankGroup
from msif_ray.corpus.reader import Block, Document
from msif_ray.corpus.windows import Skipped
from msif_ray.influence.compress import Metric
from msif_ray.influence.directions import DenseDirections
from msif_ray.influence.ekfac import Basis
from msif_ray.influence.gauss_newton import ProductSums
from msif_ray.influence.scoring import Scorer
from msif_ray.store import save_tensors

REASON = "its loss is not finite"
WINDOW = 8
# Its embedding is infinite here, and the first documents have no such token.
BAD = " sea"
GOOD = tuple(
    Document(row["id"], None, row["text"].replace(BAD, " river")) for row in models.random_documents(4, 6, (3, 20))
)
# Of three windows, and of two, of which the last is as wide as short documents are.
FIRST = Document("first", None, f"the river{BAD} of green old stone in the city house is light of the green old")
LAST = Document("last", None, f"the old river in the green city of light stone{BAD}")
EVERY = (GOOD[0], FIRST, *GOOD[1:4], LAST, *GOOD[4:])
# Each window in a batch of its own, some together, and all.
BATCHES = (1, 16, 10_000)


def setup_of(folder: Path, infinite: Sequence[str] = (BAD,), **sizes: Any) -> ModelSetup:
    model = models.build_model("gpt_neox", 5, **sizes)
    models.save(model, models.build_tokenizer(pad=True), folder / "model")
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    for token in infinite:
        tensors["gpt_neox.embed_in.weight"][models.VOCABULARY.index(token.replace(" ", "Ġ"))] = torch.inf
    save_file(tensors, path, {"format": "pt"})
    model_path = str(folder / "model")
    return ModelSetup("base", model_path, model_path, None, "float64", WINDOW, False, 40, 0, threads=1, cuda=False)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> ModelSetup:
    return setup_of(tmp_path_factory.mktemp("not-finite"))


@pytest.fixture(scope="module")
def shapes(setup: ModelSetup) -> dict[str, tuple[int, int]]:
    return {name: each.shape for name, each in Rank(setup).maps.items()}


def summed(one: Replica, setup: ModelSetup, job: Any, found: Sequence[Document], step: Path) -> Coverage:
    """A job's sums over the documents, in two blocks."""
    destination, half = Destination(step), len(found) // 2
    one.prepare(setup, job, destination)
    for number, documents in enumerate((found[:half], found[half:])):
        one.accumulate(Block(f"0-{number}", tuple(documents)))
    one.commit(destination)
    return Coverage(tuple(read_disjoint(step)), frozenset({"0-0", "0-1"}))


def replica() -> Replica:
    return Replica(RankResources(1, 1, 0.0))


def same(found: Coverage, wanted: Coverage, maps: Sequence[str]) -> None:
    assert found.skipped == [("first", REASON), ("last", REASON)]
    assert (found.documents, found.tokens, found.windows) == (wanted.documents, wanted.tokens, wanted.windows)
    for name in maps:
        total = wanted.total(name)
        assert found.total(name).keys() == total.keys()
        for key, tensor in total.items():
            close = {"rtol": 1e-11, "atol": 1e-11 * float(tensor.abs().max())}
            torch.testing.assert_close(found.total(name)[key], tensor, **close)


@pytest.fixture(scope="module")
def fitted(
    setup: ModelSetup, shapes: dict[str, tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Coverage, Coverage]:
    """A folder with bases, and the sums over the corpus without the documents."""
    folder, one = tmp_path_factory.mktemp("fitted"), replica()
    covariance = summed(one, setup, CovarianceJob(True, tuple(shapes)), GOOD, folder / "covariance")
    for name in shapes:
        fit.write_basis(name, folder, covariance)
    return folder, covariance, summed(one, setup, corrections(folder, shapes, 0), GOOD, folder / "correction")


def corrections(folder: Path, maps: Mapping[str, Any], memory: int | None) -> CorrectionJob:
    return CorrectionJob(True, tuple(maps), memory, factors=folder, bases=bases_checksum(folder, tuple(maps)))


@pytest.mark.parametrize("tokens", BATCHES)
@pytest.mark.parametrize("memory", [0, 12_000, None])  # for what is kept: nothing, some batches, everything
def test_a_fit(
    setup: ModelSetup,
    shapes: dict[str, tuple[int, int]],
    fitted: tuple[Path, Coverage, Coverage],
    tmp_path: Path,
    tokens: int,
    memory: int | None,
) -> None:
    folder, covariance, correction = fitted
    one, setup = replica(), replace(setup, tokens_per_batch=tokens)
    job = CovarianceJob(True, tuple(shapes), memory)
    same(summed(one, setup, job, EVERY, tmp_path / "covariance"), covariance, list(shapes))
    job = corrections(folder, shapes, memory)
    same(summed(one, setup, job, EVERY, tmp_path / "correction"), correction, list(shapes))


@dataclass(frozen=True)
class Given:
    """A job of which the work is made here."""

    make: Callable[[], Any]
    sampled_labels: bool = False
    tracked: tuple[str, ...] | None = None

    def start(self, maps: Sequence[str], device: torch.device) -> Any:
        return self.make()


def directions(shapes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(3, *shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize("tokens", BATCHES)
def test_products(setup: ModelSetup, shapes: dict[str, tuple[int, int]], tmp_path: Path, tokens: int) -> None:
    job = Given(lambda: ProductWork(ProductSums(directions(shapes))))
    wanted = summed(replica(), setup, job, GOOD, tmp_path / "without")
    found = summed(replica(), replace(setup, tokens_per_batch=tokens), job, EVERY, tmp_path / "with")
    same(found, wanted, list(shapes))


def works(shapes: Mapping[str, tuple[int, int]], folder: Path) -> dict[str, Any]:
    """The jobs that gather something of each document."""
    scorer = Scorer({name: DenseDirections(each) for name, each in directions(shapes).items()})
    loaded, pairs = LoadedDirections([scorer], [3], 0), dict.fromkeys((each.id for each in EVERY), (0, 2))
    plain = {
        name: Metric(Basis(*(torch.eye(n, dtype=torch.float64) for n in (columns, out))), *ones(out, columns))
        for name, (out, columns) in shapes.items()
    }
    job = IndexJob(folder, 64, torch.float64, None)
    return {
        "scores": Given(lambda: _ScoreWork(loaded)),
        "detail": Given(lambda: _DetailWork(loaded, shares=Shares(True, WINDOW - 1))),
        "pairs": Given(lambda: _TokenWork(loaded, pairs, WINDOW - 1)),
        "index": Given(lambda: _IndexWork(job, plain)),
        "reference": ReferenceJob(),
    }


def ones(*sizes: int) -> list[Tensor]:
    return [torch.ones(size, dtype=torch.float64) for size in sizes]


def of_each(taken: Sequence[Any]) -> dict[str, Any]:
    """The numbers that were gathered, by document."""
    found: dict[str, Any] = {}
    for each in taken:
        if isinstance(each, IndexedBatch):
            for piece in each.pieces:
                found[piece.document_id] = found.get(piece.document_id, 0.0) + piece.squared_norm
        elif isinstance(each, tuple):
            found.setdefault(each[0], {})[each[1]] = each[2]
        elif hasattr(each, "query"):
            key = (each.start, each.query)
            found.setdefault(each.document_id, {})[key] = torch.from_numpy(each.by_token)
        else:
            by_token = {start: torch.from_numpy(shares) for start, shares in each.by_token}
            found[each.document_id] = (each.scores, each.squared_norm, each.by_map, by_token)
    return found


@pytest.mark.parametrize("what", ["scores", "detail", "pairs", "index", "reference"])
@pytest.mark.parametrize("tokens", BATCHES)
def test_what_is_gathered_of_each_document(
    setup: ModelSetup, shapes: dict[str, tuple[int, int]], tmp_path: Path, what: str, tokens: int
) -> None:
    def gathered(setup: ModelSetup, documents: tuple[Document, ...]) -> tuple[Outcome, Any]:
        one = replica()
        one.prepare(setup, works(shapes, tmp_path)[what])
        return one.process(Block("0-0", documents))

    _, wanted = gathered(setup, GOOD)
    outcome, found = gathered(replace(setup, tokens_per_batch=tokens), EVERY)
    assert [skip.document_id for skip in outcome.skipped] == ["first", "last"]
    assert of_each(found).keys() == {each.id for each in GOOD}
    close = {"rtol": 1e-4, "atol": 1e-4} if what == "detail" else {"rtol": 1e-9, "atol": 1e-12}  # shares are float32
    torch.testing.assert_close(of_each(found), of_each(wanted), **close)


@pytest.mark.parametrize("documents", [EVERY, (FIRST, LAST)])
def test_a_block_of_an_index(
    setup: ModelSetup, shapes: dict[str, tuple[int, int]], tmp_path: Path, documents: tuple[Document, ...]
) -> None:
    one, given = replica(), works(shapes, tmp_path)["index"]
    one.prepare(replace(setup, tokens_per_batch=1), given)
    outcome, taken = one.process(Block("0-0", documents))
    task = IndexTask(setup, given.make().job, None, layout.index_group(tmp_path, 0))  # type: ignore[arg-type]
    task.write(Block("0-0", ()), outcome, taken)
    block = IndexBlock(tmp_path, [list(shapes)], "0-0", torch.float64)
    assert block.documents == [each.id for each in documents if each in GOOD]
    assert block.skipped == [Skipped("first", REASON), Skipped("last", REASON)]


def test_a_window_is_told_by_itself_whether_its_loss_is_finite(
    setup: ModelSetup, shapes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    """A row that is padded may be NaN: here by what it is padded with, with eager attention in a sliding window."""
    job = CovarianceJob(True, tuple(shapes))
    wanted = summed(replica(), setup, job, GOOD, tmp_path / "without")
    assert models.VOCABULARY.index(models.UNKNOWN) == 0
    padded = setup_of(tmp_path, infinite=(BAD, models.UNKNOWN))
    same(summed(replica(), padded, job, EVERY, tmp_path / "with"), wanted, list(shapes))


class Together(Replica):
    """A replica of which every rank's process has a copy: all do the same, and tell each other what came of it."""

    def _on_ranks(self, method: str, *arguments: Any) -> list[Any]:
        found: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(found, super()._on_ranks(method, *arguments)[0])
        return found


def sharded(setup: ModelSetup, folders: list[Path]) -> None:
    """Covariances over the documents, by the ranks of one model."""
    rank.join = lambda *_: None  # type: ignore[assignment]
    place = RankGroup(distributed.get_rank(), distributed.get_world_size(), "", 0)
    one = Together(RankResources(1, 1, 0.0))
    one._local, one._setup = Rank(setup, place), setup
    one._local.load()
    for folder, documents in zip(folders, (GOOD, EVERY), strict=True):
        destination = Destination(folder)
        one.prepare(setup, CovarianceJob(True), destination)
        one.accumulate(Block("0-0", documents))
        one._on_ranks("write_sums", folder / "sums")
        if place.rank == 0:
            save_tensors(folder / "counts.safetensors", {"windows": torch.tensor(one._sums.counts[0][1].windows)})


@pytest.mark.long
def test_two_ranks_that_shard_the_model(tmp_path: Path) -> None:
    """They take as many passes each, or they would wait for each other."""
    setup = replace(setup_of(tmp_path, hidden=160, intermediate=160, std=0.05), tokens_per_batch=2 * WINDOW)
    folders = [tmp_path / "without", tmp_path / "with"]
    ranks.run(2, sharded, setup, folders)
    counts = [load_file(folder / "counts.safetensors")["windows"] for folder in folders]
    assert counts[0] == counts[1]
    for name in Rank(setup).maps:
        parts = [
            [load_file(layout.part_file(folder / "sums", name, number)) for number in range(2)] for folder in folders
        ]
        for side in ("A", "S"):
            wanted, found = (sum(part[side] for part in each) for each in parts)
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))
