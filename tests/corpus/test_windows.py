"""Encoding, windows and batches: every target once, nothing lost in silence."""

import random
from itertools import pairwise

import models
import pytest
from tokenizers.processors import TemplateProcessing

from msif_ray.corpus.batches import pack
from msif_ray.corpus.queries import Query
from msif_ray.corpus.reader import Document
from msif_ray.corpus.windows import Encoded, Skipped, Window, encode, to_batch
from msif_ray.influence.batch import WindowKey

TOKENIZER = models.build_tokenizer()


def tokens(text):
    return TOKENIZER(text)["input_ids"]


@pytest.mark.parametrize("seed", range(5))
def test_every_target_is_in_exactly_one_window(seed):
    rng = random.Random(seed)
    for _ in range(50):
        length, limit = rng.randint(2, 30), rng.randint(2, 12)
        first = rng.randint(1, length - 1)
        ids = tuple(rng.randrange(1000) for _ in range(length))
        document = Encoded("d", ids, tuple(t >= first for t in range(length)))
        windows = list(document.windows(limit))
        predicted = [i for window in windows for i, target in zip(window.ids, window.targets, strict=True) if target]
        assert tuple(predicted) == ids[first:]
        assert all(window.ids[0] == ids[window.key.window * (limit - 1)] for window in windows)
        assert all(2 <= len(window.ids) <= limit and any(window.targets) for window in windows)
        assert not any(window.targets[0] for window in windows)
        for one, two in pairwise(windows):
            assert one.ids[-1] == two.ids[0]


def test_prompts_are_masked_and_eos_is_a_target():
    eos = TOKENIZER.eos_token_id
    found = encode(TOKENIZER, Document("d", "the king", " is old", has_prompt=True), append_eos=True)
    assert found.ids == (*tokens("the king"), *tokens(" is old"), eos)
    assert found.targets == (False, False, True, True, True)
    found = encode(TOKENIZER, Document("d", None, "the king is old"), append_eos=False)
    assert found.ids == tuple(tokens("the king is old")) and found.targets == (False, True, True, True)
    assert encode(TOKENIZER, Document("d", "", "the", has_prompt=True), append_eos=True).targets == (False, True)
    bos = models.build_tokenizer(bos=True)
    found = encode(bos, Document("d", "the", "the", has_prompt=True), append_eos=False)
    assert found.ids == (bos.bos_token_id, *tokens("the"), *tokens("the"))  # once, before the prompt
    assert found.targets == (False, False, True)


def ending():
    """A tokenizer that ends every text with EOS by itself, and knows EOS by its name."""
    tokenizer = models.build_tokenizer(bos=True)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[(name, models.VOCABULARY.index(name)) for name in ("<bos>", "<eos>")]
    )
    return tokenizer


OWN_EOS = {
    "a prompt is not ended": (("the king", " is old"), {}, True, ["<bos>", "the", "Ġking", "Ġis", "Ġold", "<eos>"]),
    "nor an empty one": (("", "the king"), {}, True, ["<bos>", "the", "Ġking", "<eos>"]),
    "but by itself": (("the<eos>", " king"), {}, True, ["<bos>", "the", "<eos>", "Ġking", "<eos>"]),
    "nor a completion": (("the", " king"), {}, False, ["<bos>", "the", "Ġking"]),
    "nor the prompt of a span": (("the", " king"), {"span": [1, 5]}, True, ["<bos>", "the", "Ġking", "<eos>"]),
    "a text is ended once": ((None, "the king"), {}, True, ["<bos>", "the", "Ġking", "<eos>"]),
    "by itself": ((None, "the king"), {}, False, ["<bos>", "the", "Ġking", "<eos>"]),
    "but for an end of its own": ((None, "the<eos>"), {}, True, ["<bos>", "the", "<eos>", "<eos>"]),
}


@pytest.mark.parametrize("case", OWN_EOS)
def test_an_eos_of_the_tokenizers_own_is_at_the_end_and_once(case):
    (prompt, text), asks, append_eos, expected = OWN_EOS[case]
    asked = Query("d", prompt, text, has_prompt=prompt is not None, **asks)
    found = encode(ending(), asked, append_eos)
    assert ending().convert_ids_to_tokens(found.ids) == expected


def test_one_token_that_begins_and_ends_texts_is_kept_before_them():
    tokenizer = models.build_tokenizer(bos=True)
    tokenizer.eos_token = tokenizer.bos_token
    for prompt in ("", "the"):
        found = encode(tokenizer, Document("d", prompt, " king", has_prompt=True), append_eos=True)
        assert found.ids == tuple(tokenizer(f"<bos>{prompt} king<bos>", add_special_tokens=False)["input_ids"])


SKIPPED = {
    "text is empty": Document("d", None, ""),
    "fewer than two tokens": Document("d", None, "the"),
    "text is null": Document("d", None, None),
    "text is not text but int": Document("d", None, 3),
    "text is not valid Unicode": Document("d", None, "a \ud800 b"),
    "prompt is null": Document("d", None, "the", has_prompt=True),
    "completion is empty": Document("d", "the", "", has_prompt=True),
}


@pytest.mark.parametrize("reason", SKIPPED)
def test_a_document_that_cannot_be_scored_says_why(reason):
    assert encode(TOKENIZER, SKIPPED[reason], append_eos=False) == Skipped("d", reason)


def window(number, length):
    return Window(WindowKey(f"d{number}", 0), tuple(range(1, length + 1)), (False, *(True,) * (length - 1)))


@pytest.mark.parametrize("seed", range(3))
def test_batches_hold_every_window_within_the_budget(seed):
    rng = random.Random(seed)
    equal = [window(i, 6) for i in range(9)]
    ragged = [window(i, rng.randint(2, 20)) for i in range(40)]
    for windows in (equal, ragged, []):
        for budget in (1, 6, 12, 50, 10**6):
            batches = pack(windows, budget)
            assert sorted(w.key.document_id for batch in batches for w in batch) == sorted(
                w.key.document_id for w in windows
            )
            assert all(len(b) == 1 or len(b) * max(len(w.ids) for w in b) <= budget for b in batches)
            assert not any(len(b) == max(len(w.ids) for w in b) for b in batches)
            assert batches == pack(windows, budget)
    assert [len(batch) for batch in pack(equal, 18)] == [3, 3, 3]


def test_no_batch_is_as_wide_as_it_is_long():
    """Tokens that come before rows would look like rows that come before tokens."""
    assert [len(batch) for batch in pack([window(i, 3) for i in range(6)], 9)] == [2, 2, 2]
    assert [len(batch) for batch in pack([window(i, 3) for i in range(3)], 100)] == [2, 1]


def test_no_batch_has_windows_from_both_sides_of_a_length_that_matters():
    windows = [window(i, length) for i, length in enumerate((3, 9, 8, 17, 5, 16, 8))]
    found = [[len(w.ids) for w in batch] for batch in pack(windows, 10**6, (8, 16))]
    assert found == [[17], [16, 9], [8, 8, 5, 3]]


def test_a_batch_is_padded_on_the_right():
    batch = to_batch([window(0, 4), window(1, 2)])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4], [1, 2, 0, 0]]
    assert batch.attention_mask.sum(1).tolist() == [4, 2]
    assert batch.targets.tolist() == [[False, True, True, True], [False, True, False, False]]
    assert batch.predicts.tolist() == [[True, True, True, False], [True, False, False, False]]
