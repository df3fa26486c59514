"""Gradients of all that a query can ask, as replicas write them, against autograd on the weights."""

from pathlib import Path
from typing import Any

import models
import pytest
import reference
import runs
import torch
from cluster.questions import BAD, GOOD, OTHER_TALK, PROMPT, TALK, completed, last_turn, only
from corpus.test_chat import PLAIN

from msif_ray.cluster import partials
from msif_ray.cluster.jobs import QueryJob
from msif_ray.cluster.partials import Coverage
from msif_ray.cluster.queries import in_order, log_likelihoods, query_blocks
from msif_ray.cluster.rank import ModelSetup, Rank
from msif_ray.cluster.sharding import RankGroup
from msif_ray.corpus.queries import Query
from msif_ray.influence.queries import truncate

PLAIN_QUERY, MARGIN = Query("plain", PROMPT, GOOD, True), Query("margin", PROMPT, GOOD, True, rather_than=BAD)
SPAN, LONG = Query("span", PROMPT, BAD, True, span=[6, 11]), Query("long", "", BAD, True, rather_than=GOOD)
CHAT, CHAT_MARGIN = (
    Query("chat", None, TALK, is_chat=True),
    Query("b", None, TALK, is_chat=True, rather_than="a market"),
)
CHAT_SPAN = Query("c", None, TALK, is_chat=True, span=[4, 9])


def written_by_hand(tokenizer: Any) -> dict[str, list[tuple[float, list[int], list[bool]]]]:
    """(sign, tokens, targets) of every query's sequences."""
    good, bad = completed(tokenizer, PROMPT, GOOD), completed(tokenizer, PROMPT, BAD)
    return {
        "plain": [(1.0, *good)],
        "margin": [(1.0, *good), (-1.0, *bad)],
        "span": [(1.0, *only(bad, 2))],  # green
        "long": [(1.0, *completed(tokenizer, "", BAD)), (-1.0, *completed(tokenizer, "", GOOD))],
        "chat": [(1.0, *last_turn(TALK))],
        "b": [(1.0, *last_turn(TALK)), (-1.0, *last_turn(OTHER_TALK))],
        "c": [(1.0, *only(last_turn(TALK), 1))],  # river
    }


def gradients(setup: ModelSetup, queries: list[Query], step: Path, ranks: int = 1) -> Coverage:
    """As a replica of so many ranks leaves them. Each has the whole model, and its share of the batches."""
    each = [Rank(setup) for _ in range(ranks)]
    for number, rank in enumerate(each):
        rank.place = RankGroup(number, ranks, "", 0)
        rank.start(QueryJob())
    blocks = query_blocks(queries, [20] * len(queries), {name: m.shape for name, m in each[0].maps.items()}, 10**6)
    assert len(blocks) == len(queries)
    for block in blocks:
        outcomes = [rank.process(block.documents).outcome() for rank in each]
        assert not outcomes[0].skipped
        folder = partials.new_folder(step, block.id)
        partials.publish(folder, [rank.write_sums(folder) for rank in each], [(block.id, outcomes[0].counts)], None)
    return Coverage(tuple(partials.read_disjoint(step)), frozenset(block.id for block in blocks))


@pytest.mark.parametrize("kind", ("gpt_neox", "gpt2"))
@pytest.mark.parametrize(("tokens_per_batch", "ranks"), [(1000, 1), (1, 1), (1, 2)])
@pytest.mark.parametrize("conversations", (False, True))
def test_gradients_and_likelihoods(
    tmp_path: Path, kind: str, tokens_per_batch: int, ranks: int, conversations: bool
) -> None:
    """Both sequences of a margin in one padded batch, each in its own, and on different ranks of one model."""
    tokenizer = models.build_tokenizer(bos=conversations, pad=True)
    tokenizer.chat_template = PLAIN
    model = models.build_model(kind, 3)
    path = str(models.save(model, tokenizer, tmp_path / "model"))
    setup = ModelSetup("s", path, path, None, "float64", None, not conversations, tokens_per_batch, 0, 1, False)
    queries = [CHAT, CHAT_MARGIN, CHAT_SPAN] if conversations else [PLAIN_QUERY, MARGIN, SPAN, LONG]
    found = gradients(setup, queries, tmp_path / "step", ranks)
    names, ids = reference.tracked_names(model), [query.id for query in queries]
    likelihoods = log_likelihoods(found, ids)
    expected = {}
    for query in ids:
        windows = written_by_hand(tokenizer)[query]
        expected[query] = reference.query_gradients(model, names, tokenizer, {"windows": windows})
        losses = [s * reference.summed_nll(model, w, reference.data_labels(w, t)).item() for s, w, t in windows]
        assert likelihoods[query] == pytest.approx(-sum(losses), rel=1e-10)
    for name in names:
        for query, tokens in zip(ids, in_order(found, name, ids), strict=True):
            torch.testing.assert_close(tokens.gradient, expected[query][name], rtol=1e-9, atol=1e-10)


def test_low_rank_is_of_the_difference(tmp_path: Path) -> None:
    """Two completions that have their first words in common differ in few directions, and those are what is kept."""
    model, tokenizer = models.build_model("gpt_neox", 3), models.build_tokenizer()
    names = reference.tracked_names(model)
    windows = written_by_hand(tokenizer)["margin"]
    difference = reference.query_gradients(model, names, tokenizer, {"windows": windows})[names[0]]
    directions, kept = truncate(difference[None], rank=2)
    left, values, right = torch.linalg.svd(difference)
    best = (left[:, :2] * values[:2]) @ right[:2]
    torch.testing.assert_close(directions.dense[0], best, rtol=1e-8, atol=1e-9)
    assert float(kept[0]) == pytest.approx(float(values[:2].square().sum() / values.square().sum()))


def test_the_same_completion_on_both_sides_is_no_question(tmp_path: Path) -> None:
    runs.two_stages(tmp_path, "run")
    path = str(tmp_path / "stage1")
    setup = ModelSetup("s", path, path, None, "float64", None, True, 1000, seed=0, threads=1, cuda=False)
    query = Query("q", PROMPT, GOOD, True, rather_than=GOOD)
    found = gradients(setup, [query], tmp_path / "step")
    assert log_likelihoods(found, ["q"]) == {"q": pytest.approx(0, abs=1e-12)}
    for name in Rank(setup).maps:
        (tokens,) = in_order(found, name, ["q"])
        assert float(tokens.gradient.abs().max()) < 1e-10
