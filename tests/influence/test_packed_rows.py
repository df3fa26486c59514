"""Documents of packed rows against autograd: with attention along the row, and among each document's own tokens."""

import models
import pipeline
import pytest
import reference
import torch
from influence.test_dense_reference import QUERIES, SMALL, score_error

from msif_ray.corpus.packed import Part

CASES = {"row": False, "document": True}


def packed_rows(seed: int, rows: int = 9) -> list[tuple[int, ...]]:
    """Rows of three documents of ragged lengths, each ended by an EOS, and where each begins and ends."""
    tokenizer, texts = models.build_tokenizer(), models.random_documents(seed, 3 * rows, words=(2, 9))
    ids = [(*tokenizer(text["text"])["input_ids"], tokenizer.eos_token_id) for text in texts]
    return [tuple(ids[3 * row : 3 * row + 3]) for row in range(rows)]


def described(seed: int, alone: bool) -> tuple[list[dict], list[dict]]:
    """The documents as the package reads them, and by hand: tokens and which of them are targets."""
    read, by_hand = [], []
    for number, documents in enumerate(packed_rows(seed)):
        row, start = sum(documents, ()), 0
        for part, own in enumerate(documents):
            name, stop = f"{number}:{part}", start + len(own)
            read.append({"id": name, "text": Part(row, start, stop, alone)})
            ids = list(own) if alone else list(row[:stop])
            targets = [t > 0 and (alone or t >= start) for t in range(len(ids))]
            by_hand.append({"id": name, "ids": ids, "targets": targets})
            start = stop
    return read, by_hand


def stages(seed: int, alone: bool, max_tokens: int | None) -> tuple[list, list]:
    """Two stages, the first of packed rows: for the package and for the reference."""
    tokenizer, first = models.build_tokenizer(), models.build_model("gpt_neox", seed)
    tune = reference.StageSpec(
        "tune",
        models.perturb(first, seed + 1),
        tokenizer,
        models.random_documents(seed + 1, 24, words=(2, 10), completions=True),
        max_tokens=16,
        seed=seed,
        **SMALL,
    )
    return tuple(
        [reference.StageSpec("pretrain", first, tokenizer, documents, max_tokens, seed=seed, **SMALL), tune]
        for documents in described(seed, alone)
    )


@pytest.mark.parametrize("attention", CASES)
@pytest.mark.parametrize("max_tokens", (None, 13))
def test_factors_and_scores_equal_the_dense_reference(attention: str, max_tokens: int | None) -> None:
    """Whole rows, and rows that are cut in the middle of documents; labels sampled, so EK-FAC is of the same losses."""
    own, dense = stages(3, CASES[attention], max_tokens)
    names = reference.tracked_names(own[0].model)
    expected = [reference.fit(stage, names) for stage in dense]
    found = [pipeline.fit(stage, 90) for stage in own]
    for name in names:
        for side, matrix in (("A", expected[0][name].A), ("S", expected[0][name].S)):
            torch.testing.assert_close(found[0].covariances[f"{side}/{name}"], matrix, rtol=1e-9, atol=1e-10)
        values = found[0].factors[name].eigenvalues
        torch.testing.assert_close(values, expected[0][name].Lambda, rtol=1e-7, atol=1e-10)
    carried = pipeline.dense(pipeline.carry(own, [fit.factors for fit in found], QUERIES))
    wanted = reference.scores(dense, QUERIES, dense[0].documents[:8], 0, names, expected)
    for tokens_per_batch in (pipeline.ALONE, pipeline.TOGETHER):
        scores = pipeline.score(carried, own[0], QUERIES, own[0].documents[:8], tokens_per_batch)
        assert max(score_error(scores, wanted)) < 1e-8


def gradients(stage: reference.StageSpec, rows: list[dict]) -> dict[str, dict[str, torch.Tensor]]:
    """Each document's gradient of every map, from one padded batch."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for captured in pipeline.captures(stage, rows, pipeline.TOGETHER):
        for name in captured.maps:
            products = captured.gradients(name).transpose(1, 2) @ captured.activations(name)
            for key, product in zip(captured.batch.keys, products, strict=True):
                found.setdefault(key.document_id, {})[name] = product
    return found


def test_along_a_row_documents_gradients_add_up_to_the_rows() -> None:
    """As a training step has it: the summed loss of a packed row is that of its documents, none counted twice."""
    (stage, _), _ = stages(4, False, None)
    row = stage.documents[:3]
    each, names = gradients(stage, row), reference.tracked_names(stage.model)
    ids = list(row[0]["text"].ids)
    whole = reference.window_gradients(stage.model, names, ids, [t > 0 for t in range(len(ids))])
    for name in names:
        summed = sum(each[document["id"]][name] for document in row)
        torch.testing.assert_close(summed, whole[name], rtol=1e-9, atol=1e-9)


def test_a_document_alone_is_what_block_diagonal_attention_makes_of_it() -> None:
    """On the whole row with a mask that ends at documents' bounds, and positions that begin anew."""
    (stage, _), _ = stages(4, True, None)
    row, model = stage.documents[:3], stage.model
    each, names = gradients(stage, row), reference.tracked_names(model)
    ids, parts = row[0]["text"].ids, [document["text"] for document in row]
    owner = torch.tensor([number for number, part in enumerate(parts) for _ in part.own])
    allowed = (owner[:, None] == owner[None]) & torch.ones(len(ids), len(ids)).tril().bool()
    mask = torch.zeros(len(ids), len(ids), dtype=torch.float64).masked_fill(~allowed, -torch.inf)[None, None]
    positions = torch.cat([torch.arange(len(part.own)) for part in parts])[None]
    for document, part in zip(row, parts, strict=True):
        logits = model(input_ids=torch.tensor([ids]), attention_mask=mask, position_ids=positions).logits[0]
        table = torch.log_softmax(logits, -1)
        loss = -sum(table[t - 1, ids[t]] for t in range(part.start + 1, part.stop))
        for name in names:
            weight = torch.autograd.grad(loss, model.get_submodule(name).weight, retain_graph=True)[0]
            torch.testing.assert_close(each[document["id"]][name][:, :-1], weight, rtol=1e-9, atol=1e-9)
