"""One rank and one replica in this process: what is skipped, what is refused and what a want of memory says."""

from dataclasses import replace
from pathlib import Path

import families
import models
import pytest
import ray
import runs
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from msif_ray import layout
from msif_ray.cluster import deaths, fit, rank
from msif_ray.cluster.factors import bases_checksum
from msif_ray.cluster.jobs import CorrectionJob, CovarianceJob
from msif_ray.cluster.partials import Coverage, covered_blocks, read_disjoint
from msif_ray.cluster.rank import ModelSetup, Rank
from msif_ray.cluster.replica import Destination, Replica
from msif_ray.cluster.room import RankResources
from msif_ray.cluster.sharding import RankGroup
from msif_ray.corpus.objectives import Classes
from msif_ray.corpus.preferences import Pairs
from msif_ray.corpus.reader import Block, Document
from msif_ray.errors import UserError
from msif_ray.fetch import obtain
from msif_ray.influence.capture import Capture, Captured
from msif_ray.store import load_tensors, save_tensors


@pytest.fixture
def setup(tmp_path: Path) -> ModelSetup:
    runs.two_stages(tmp_path, "run")
    model = str(tmp_path / "stage0")
    return ModelSetup("base", model, model, None, "float64", 8, False, 40, seed=0, threads=1, cuda=False)


def documents(count: int) -> tuple[Document, ...]:
    return tuple(Document(row["id"], None, row["text"]) for row in models.random_documents(4, count, (3, 20)))


def covariances(setup: ModelSetup, found: tuple[Document, ...], step: Path) -> Coverage:
    """The sums over one block, and the block's outcome's reasons in the manifest."""
    one, destination = Replica(RankResources(1, 1, 0.0)), Destination(step)
    one.prepare(setup, CovarianceJob(False), destination)
    one.accumulate(Block("0-0", found))
    one.commit(destination)
    return Coverage(tuple(read_disjoint(step)), frozenset({"0-0"}))


def test_a_classifier_that_padding_reaches_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    sizes = {"vocab_size": len(models.VOCABULARY), "emb_dim": 8, "n_layers": 1, "n_heads": 2}
    config = AutoConfig.for_model("xlm", **sizes, summary_type="last", pad_token_id=3, mask_token_id=4)
    made = models.randomise(AutoModelForSequenceClassification.from_config(config), 0)
    model = str(models.save(made, models.build_tokenizer(), tmp_path / "xlm"))
    setup = ModelSetup("c", model, model, None, "float32", 8, False, 40, seed=0, threads=1, cuda=False)
    with pytest.raises(UserError, match=rf"^objective: {model} .* reads a text in a padded batch otherwise than alone"):
        Rank(replace(setup, objective=Classes(("a", "b"))))


def spoil(monkeypatch: pytest.MonkeyPatch, document: str) -> None:
    """Makes the losses and gradients of one document's windows infinite, as a number that overflows does."""
    run = Capture.run

    def spoiled(self: Capture, batch, labels=None) -> Captured:
        captured = run(self, batch, labels)
        for row, key in enumerate(batch.keys):
            if key.document_id == document:
                captured.losses[row] = torch.nan
                for name in captured.maps:
                    captured.vectors(name)[1][row] = torch.nan
        return captured

    monkeypatch.setattr(Capture, "run", spoiled)


def test_a_document_without_a_finite_loss_is_skipped_and_spoils_no_sum(
    setup: ModelSetup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = documents(6)
    wanted = covariances(setup, every[:2] + every[3:], tmp_path / "without")
    spoil(monkeypatch, every[2].id)
    found = covariances(setup, every, tmp_path / "spoiled")
    assert found.skipped == [(every[2].id, "its loss is not finite")]
    assert (found.documents, found.tokens) == (wanted.documents, wanted.tokens)
    for name in found.partials[0].parts[0]:
        for key, tensor in wanted.total(name).items():
            torch.testing.assert_close(found.total(name)[key], tensor)


def test_a_document_with_a_token_that_the_model_has_not_is_skipped(setup: ModelSetup, tmp_path: Path) -> None:
    tokenizer = models.build_tokenizer(pad=True)
    tokenizer.add_tokens(["<|user|>"])
    tokenizer.save_pretrained(setup.tokenizer)
    every = documents(3)
    unknown = Document("chat", None, "<|user|> the sea")
    found = covariances(setup, (every[0], unknown, *every[1:]), tmp_path / "step")
    size = len(models.VOCABULARY)
    assert found.skipped == [("chat", f"token {size} is not among the model's {size}")] and found.documents == 3


def test_lengths_after_which_a_model_computes_otherwise_part_batches_and_pairs(
    setup: ModelSetup, tmp_path: Path
) -> None:
    """Eight tokens are on the one side of a length that matters, and nine on the other."""
    folder = str(models.save(families.build("phi3_longrope", 0), models.build_tokenizer(pad=True), tmp_path / "rope"))
    pairs = replace(setup, max_tokens=None, tokens_per_batch=1000, objective=Pairs(0.1))
    rank = Rank(replace(pairs, model=folder, tokenizer=folder))
    rank.start(CovarianceJob(False))

    def pair(chosen: int, rejected: int) -> Document:
        words = models.VOCABULARY[29:53]
        texts = ["the" + "".join(words[:count]).replace("Ġ", " ") for count in (chosen - 1, rejected - 1)]
        return Document(f"{chosen}-{rejected}", None, texts[0], rejected=texts[1], reference=0.0)

    outcome = rank.process([pair(8, 5), pair(12, 9), pair(8, 9)])
    assert [(each.document_id, each.reason) for each in outcome.skipped] == [
        ("8-9", "its two sequences have 8 and 9 tokens, and the model embeds positions otherwise beyond 8")
    ]
    assert outcome.tokens == {"8-5": 13, "12-9": 21}
    windows = [w for each in (pair(8, 5), pair(12, 9)) for w in rank.setup.encode(rank.tokenizer, each).windows(99)]
    assert [[w.key.document_id for w in batch] for batch in rank.pack(windows)] == [["12-9"], ["8-5"]]


def test_a_configuration_that_is_for_inference_does_not_change_what_is_computed(
    setup: ModelSetup, tmp_path: Path
) -> None:
    """RWKV would halve weights in place after every second layer, and any model give a tuple for an output."""
    sizes = {"hidden_size": 8, "attention_hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 4}
    special = {"vocab_size": len(models.VOCABULARY), "bos_token_id": 2, "eos_token_id": 1}
    config = AutoConfig.for_model("rwkv", **sizes, **special, context_length=64, rescale_every=2, return_dict=False)
    model = models.randomise(AutoModelForCausalLM.from_config(config), 0)
    folder = str(models.save(model, models.build_tokenizer(pad=True), tmp_path / "rwkv"))
    rank = Rank(replace(setup, model=folder, tokenizer=folder, max_tokens=None))
    rank.start(CovarianceJob(False))
    assert len(rank.process(documents(3)).tokens) == 3
    for name, weight in model.named_parameters():
        assert torch.equal(rank.model.get_parameter(name), weight), name


def test_a_model_that_lacks_a_tensor_on_this_node_is_refused(setup: ModelSetup) -> None:
    path = Path(setup.model) / "model.safetensors"
    tensors = load_file(path)
    del tensors["gpt_neox.final_layer_norm.bias"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"stage0 has no tensor gpt_neox\.final_layer_norm\.bias on this node; put"):
        Rank(setup)


def test_a_commit_refuses_the_sums_of_another_step(setup: ModelSetup, tmp_path: Path) -> None:
    one = Replica(RankResources(1, 1, 0.0))
    one.prepare(setup, CovarianceJob(False), Destination(tmp_path / "covariance"))
    one.accumulate(Block("0-0", documents(2)))
    with pytest.raises(RuntimeError, match="belong in"):
        one.commit(Destination(tmp_path / "correction", "0123"))
    assert covered_blocks(read_disjoint(tmp_path / "correction")) == set()


def test_a_full_gpu_is_said_with_the_key_to_lower(setup: ModelSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Replica(RankResources(1, 1, 0.0))
    one.prepare(setup, CovarianceJob(False))

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")

    monkeypatch.setattr(Capture, "run", full)
    with pytest.raises(UserError, match=r"^cluster\.tokens_per_batch: .*GPU's memory is full") as refused:
        one.process(Block("0-0", documents(2)))
    assert "\n" not in str(refused.value)


def test_what_a_model_s_own_code_fails_at_is_one_line(setup: ModelSetup, tmp_path: Path) -> None:
    """XGLM makes a number of float64's range as a float32."""
    sizes = {"vocab_size": len(models.VOCABULARY), "d_model": 8, "ffn_dim": 12, "num_layers": 1, "attention_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("xglm", **sizes))
    folder = str(models.save(models.randomise(model, 0), models.build_tokenizer(), tmp_path / "xglm"))
    single, one = (
        Rank(replace(setup, model=folder, tokenizer=folder, dtype=dtype)) for dtype in ("float32", "float64")
    )
    for each in (single, one):
        each.start(CovarianceJob(False))
    assert not single.process(documents(2)).not_finite
    with pytest.raises(UserError, match=r"^cluster\.dtype: .* fails on documents in float64 \(RuntimeError: .*; try"):
        one.process(documents(2))


def of_two(setup: ModelSetup, monkeypatch: pytest.MonkeyPatch) -> Rank:
    """The first of two ranks, though with all of the model, and by itself."""

    def whole(folder: str, dtype: torch.dtype, *_: object) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    monkeypatch.setattr(rank, "join", lambda *_: None)
    monkeypatch.setattr(rank, "load_sharded", whole)
    one = Rank(setup, RankGroup(0, 2, "", 0))
    one.load()
    one.start(CovarianceJob(False))
    return one


@pytest.mark.parametrize(
    ("said", "raised", "match"),
    [
        ("a number of another type", UserError, r"^cluster\.dtype: .*stage0 fails on documents in float64 \(Runtime"),
        ("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer", RuntimeError, "by peer"),
    ],
)
def test_what_the_model_s_code_fails_at_on_a_shard_is_one_line_and_a_lost_rank_no_fault_of_it(
    setup: ModelSetup, monkeypatch: pytest.MonkeyPatch, said: str, raised: type[Exception], match: str
) -> None:
    one = of_two(setup, monkeypatch)

    def fail(*_: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(one.model.get_submodule("gpt_neox.layers.0.mlp.act"), "forward", fail)
    with pytest.raises(raised, match=match):
        one.process(documents(2))


def test_what_fails_outside_of_the_model_s_code_is_no_fault_of_it(
    setup: ModelSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Rank(setup)
    one.start(CovarianceJob(False))
    monkeypatch.setattr(Capture, "_captured", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        one.process(documents(2))


@pytest.mark.parametrize("name", [
    "ActorDiedError", "ActorUnavailableError", "WorkerCrashedError", "NodeDiedError", "ObjectLostError",
    "OwnerDiedError", "OutOfMemoryError",
])  # fmt: skip
def test_what_ends_a_replica_is_known_as_a_death(name: str) -> None:
    assert issubclass(getattr(ray.exceptions, name), deaths.DEATHS)


def test_a_basis_that_is_there_is_not_replaced(setup: ModelSetup, tmp_path: Path) -> None:
    covariance = covariances(setup, documents(6), tmp_path / "covariance")
    name = min(covariance.partials[0].parts[0])
    save_tensors(layout.basis_file(tmp_path, name), {"mine": torch.ones(1)})
    fit.write_basis(name, tmp_path, covariance)
    assert set(load_tensors(layout.basis_file(tmp_path, name))) == {"mine"}


def test_bases_that_were_replaced_are_refused(setup: ModelSetup, tmp_path: Path) -> None:
    covariance = covariances(setup, documents(6), tmp_path / "covariance")
    names = sorted(covariance.partials[0].parts[0])
    for name in names:
        fit.write_basis(name, tmp_path, covariance)
    checksum = bases_checksum(tmp_path, names)
    one = Replica(RankResources(1, 1, 0.0))
    one.prepare(setup, CorrectionJob(True, factors=tmp_path, bases=checksum))
    tensors = load_tensors(layout.basis_file(tmp_path, names[0]))
    tensors["activation_basis"][:, 0] *= -1  # as good a basis, and another one
    save_tensors(layout.basis_file(tmp_path, names[0]), tensors)
    assert bases_checksum(tmp_path, names) != checksum
    with pytest.raises(UserError, match="bases were replaced"):
        one.prepare(setup, CorrectionJob(True, factors=tmp_path, bases=checksum))


@pytest.mark.parametrize("memory", [None, 0, 20_000])
def test_corrections_take_what_the_covariances_pass_captured(
    setup: ModelSetup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int | None
) -> None:
    """The same sums bit by bit as by passes of their own, with no pass over what was kept."""
    every = documents(6)
    covariance = covariances(setup, every, tmp_path / "covariance")
    names = sorted(covariance.partials[0].parts[0])
    for name in names:
        fit.write_basis(name, tmp_path, covariance)
    correction = CorrectionJob(True, tuple(names), memory, factors=tmp_path, bases=bases_checksum(tmp_path, names))
    passes: list[int] = []
    run = Capture.run

    def counted(self: Capture, batch, labels=None) -> Captured:
        passes.append(len(batch.keys))
        return run(self, batch, labels)

    monkeypatch.setattr(Capture, "run", counted)

    def corrected(step: Path, before: CovarianceJob | None) -> Coverage:
        one, destination = Replica(RankResources(1, 1, 0.0)), Destination(step)
        if before is not None:
            one.prepare(setup, before, Destination(tmp_path / "again"))
            one.accumulate(Block("0-0", every))
        passes.clear()
        one.prepare(setup, correction, destination)
        one.accumulate(Block("0-0", every))
        one.commit(destination)
        return Coverage(tuple(read_disjoint(step)), frozenset({"0-0"}))

    wanted = corrected(tmp_path / "alone", None)
    batches = len(passes)
    found = corrected(tmp_path / "kept", CovarianceJob(True, tuple(names), memory))
    assert batches > 2
    assert {None: len(passes) == 0, 0: len(passes) == batches}.get(memory, 0 < len(passes) < batches)
    other_labels = corrected(tmp_path / "other", CovarianceJob(False, tuple(names), memory))
    assert len(passes) == batches  # the data's own labels have other gradients
    for each in (found, other_labels):
        assert each.tokens == wanted.tokens
        for name in names:
            assert torch.equal(each.total(name)["E"], wanted.total(name)["E"])


def test_eigenvalues_that_are_not_finite_are_refused_by_the_map_s_name(tmp_path: Path) -> None:
    class Overflowing:
        documents = 1

        def total(self, part: str) -> dict[str, torch.Tensor]:
            return {"E": torch.tensor([[1.0, torch.inf]])}

    with pytest.raises(UserError, match=r"^layers\.0\.mlp: the corrected eigenvalues are not finite"):
        fit.write_eigenvalues("layers.0.mlp", tmp_path, Overflowing())


def test_files_are_fetched_before_ranks_wait_for_each_other(setup: ModelSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    """One node may take longer over that than the others wait."""

    class Remote:
        def options(self, **_: object) -> "Remote":
            return self

        def remote(self, *_: object) -> None:
            pass

    told: list[str] = []
    monkeypatch.setattr(ray, "remote", lambda _: Remote())
    monkeypatch.setattr(ray, "get", lambda _: ("127.0.0.1", 1))
    monkeypatch.setattr(Replica, "_on_ranks", lambda self, method, *_: told.append(method))
    Replica(RankResources(2, 1, 0.0))._spawn(setup)
    assert told == ["fetch", "load"]
    place, (_, source) = RankGroup(0, 2, "nowhere", 1), obtain(setup.model, None)
    Rank(replace(setup, model=source), place).fetch()
    (Path(setup.model) / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(UserError, match="its files have changed since this run was started"):
        Rank(replace(setup, model=source), place).fetch()
