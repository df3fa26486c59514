"""Tokens as characters: joined they are the text, and no token shows half a character."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
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


@pytest.fixture(scope="module")
def bytes_instead() -> PreTrainedTokenizerFast:
    """Llama's way: a token per letter, `▁` for a space, and bytes instead of what is none of the letters."""
    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"aehikt"]
    backend = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaces = decoders.Replace("▁", " ")
    backend.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", ["the hat", "a\nb é\n😀", "\n世\n", "  é ", "ends with \ufffd", "a 😀"])
def test_bytes_instead_of_letters_are_shown_whole(bytes_instead: PreTrainedTokenizerFast, text: str) -> None:
    ids = bytes_instead(text)["input_ids"]
    found = pieces(bytes_instead, ids)
    assert len(found) == len(ids) and "".join(found) == bytes_instead.decode(ids) == text


def test_a_character_cut_in_its_middle_is_shown_as_one_that_is_broken(bytes_instead: PreTrainedTokenizerFast) -> None:
    """Its decoder breaks the line's end before it, too, which has been shown by then."""
    ids = [*bytes_instead("the\n😀")["input_ids"][:6], bytes_instead.eos_token_id, *bytes_instead("a hat")["input_ids"]]
    assert bytes_instead.convert_ids_to_tokens(ids)[4:8] == ["<0x0A>", "<0xF0>", "</s>", "▁"]
    assert bytes_instead.decode(ids) == "the\ufffd\ufffd</s> a hat"
    assert pieces(bytes_instead, ids) == ["t", "", *"he", "\n", "\ufffd</s>", "", *" a hat"]


@pytest.mark.parametrize("which", ["bytes_alone", "bytes_instead"])
def test_any_tokens_have_a_piece_each(which: str, request: pytest.FixtureRequest) -> None:
    tokenizer, rng = request.getfixturevalue(which), random.Random(0)
    for _ in range(500):
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randint(0, 12))]
        found = pieces(tokenizer, ids)
        assert len(found) == len(ids)
        whole = tokenizer.decode(ids)
        assert "\ufffd" in whole or "".join(found) == whole


def test_a_decoder_that_rewrites_what_came_before_ends_nothing() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    backend.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "X")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    assert tokenizer.decode([0, 1, 2, 0]) == "Xca"
    assert pieces(tokenizer, [0, 1, 2, 0]) == ["a", "b", "c", "a"]
