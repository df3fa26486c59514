"""Tokens as characters: joined they are the text, and no token shows half a character."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from msif_ray.corpus.pieces import pieces


@pytest.fixture(scope="module")
def bytes_alone() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: a token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(
    "text",
    ["naïve 世界", "שלום عليكم", "a👩‍👩‍👧b", "kept \ufffd as it is", "ends with \ufffd", " two "],
)
def test_joined_they_are_the_text(bytes_alone: PreTrainedTokenizerFast, text: str) -> None:
    ids = bytes_alone(text)["input_ids"]
    found = pieces(bytes_alone, ids)
    assert len(found) == len(ids) == len(text.encode())
    assert "".join(found) == text
    if "\ufffd" not in text:
        assert [piece for piece in found if piece] == list(text)


def test_a_character_stands_with_its_first_token(bytes_alone: PreTrainedTokenizerFast) -> None:
    assert pieces(bytes_alone, bytes_alone("é世x")["input_ids"]) == ["é", "", "世", "", "", "x"]
