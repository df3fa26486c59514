"""What an objective makes of a document, and why it makes nothing of another."""

import models
import pytest

from msif_ray.corpus.objectives import Classes, as_pieces, as_text, encode_for
from msif_ray.corpus.pieces import pieces
from msif_ray.corpus.reader import Document
from msif_ray.corpus.windows import Skipped, pack, to_batch

TOKENIZER = models.build_tokenizer()
CLASSES = Classes(("negative", "positive"))


def text(words: object, label: object) -> Document:
    return Document("d", None, words, label=label)


@pytest.mark.parametrize(("label", "number"), [("positive", 1), (1, 1), ("negative", 0), (0, 0)])
def test_a_label_is_a_class_s_name_or_number(label: object, number: int) -> None:
    found = encode_for(CLASSES, TOKENIZER, text("the king", label), append_eos=False, max_tokens=8)
    assert found.ids == tuple(TOKENIZER("the king")["input_ids"])
    batch = to_batch(list(found.windows(8)))
    assert batch.classes is not None and batch.classes.tolist() == [number]
    assert batch.predicts.tolist() == [[True, True]]


def test_one_token_is_a_text_and_padding_is_none() -> None:
    short, long = (encode_for(CLASSES, TOKENIZER, text(each, 0), False, 8) for each in ("the", "the king is old"))
    (rows,) = pack([*short.windows(8), *long.windows(8)], 100)
    assert to_batch(rows).predicts.tolist() == [[True] * 4, [True, False, False, False]]


SKIPPED = {
    "text is null": text(None, 0),
    "text is empty": text("", 0),
    "label is null": text("the", None),
    "label is not a class's name or number but float": text("the", 1.0),
    "label is not a class's name or number but bool": text("the", True),
    "label 'good' is no class of the model: negative, positive": text("the", "good"),
    "label '2' is no class of the model: negative, positive": text("the", 2),
    "label '-1' is no class of the model: negative, positive": text("the", -1),
    "longer than max_tokens (3), and a classifier reads a text whole": text("the king is old", 0),
}


@pytest.mark.parametrize("reason", SKIPPED)
def test_what_cannot_be_read_is_skipped_with_a_reason(reason: str) -> None:
    assert encode_for(CLASSES, TOKENIZER, SKIPPED[reason], False, 3) == Skipped("d", reason)


def test_a_long_text_is_cut_where_asked() -> None:
    cut = Classes(CLASSES.names, truncate=True)
    found = encode_for(cut, TOKENIZER, text("the king is old", 0), append_eos=True, max_tokens=3)
    assert found.ids == (*TOKENIZER("the king")["input_ids"], TOKENIZER.eos_token_id)
    assert len(encode_for(cut, TOKENIZER, text("the king is old", 0), False, None).ids) == 4


def test_a_classified_text_is_shown_with_its_label() -> None:
    document = text("the king", 1)
    found = pieces(TOKENIZER, TOKENIZER("the king")["input_ids"])
    assert as_text(CLASSES, document) == "the king\n\n[label: positive]"
    assert as_pieces(CLASSES, document, found) == ["the", " king\n\n[label: positive]"]
