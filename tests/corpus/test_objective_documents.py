"""What an objective makes of a document, and why it makes nothing of another."""

from typing import Any

import models
import pytest
from corpus.test_windows import ending

from msif_ray.corpus.batches import pack
from msif_ray.corpus.objectives import Classes, as_text, encode_for, frame, framed
from msif_ray.corpus.pieces import pieces
from msif_ray.corpus.preferences import Pairs
from msif_ray.corpus.reader import Document
from msif_ray.corpus.windows import Skipped, to_batch

TOKENIZER = models.build_tokenizer()
CLASSES = Classes(("negative", "positive"))


PAIRS = Pairs(0.1)
MEANS = Pairs(0.1, length_normalised=True)
PLAIN = "{% for m in messages %}<bos>{{ m['role'] }} {{ m['content'] }}<eos>{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<bos>assistant{% endif %}"
SAID = " {% generation %}{{ m['content'] }}<eos>{% endgeneration %}"
MARKED = "{% for m in messages %}<bos>{{ m['role'] }}{% if m['role'] == 'assistant' %}" + SAID
MARKED += "{% else %} {{ m['content'] }}<eos>{% endif %}{% endfor %}"


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
    encoded = encode_for(CLASSES, TOKENIZER, document, False, 8)
    around = frame(CLASSES, document, encoded)
    assert as_text(CLASSES, document, TOKENIZER) == "the king\n\n[label: positive]"
    assert framed(pieces(TOKENIZER, encoded.ids), around) == ["the", " king\n\n[label: positive]"]


def test_an_eos_of_the_tokenizers_own_is_at_the_end_and_once() -> None:
    tokenizer = ending()
    found = encode_for(PAIRS, tokenizer, pair("the king", " is old", " is the sea"), append_eos=True, max_tokens=None)
    assert not isinstance(found, Skipped)
    chosen, rejected = (tokenizer.convert_ids_to_tokens(found.ids[part]) for part in found.parts)
    assert chosen == ["<bos>", "the", "Ġking", "Ġis", "Ġold", "<eos>"]
    assert rejected == ["<bos>", "the", "Ġking", "Ġis", "Ġthe", "Ġsea", "<eos>"]
    unprompted = encode_for(PAIRS, tokenizer, pair(..., "the king", "the sea"), append_eos=True, max_tokens=None)
    assert not isinstance(unprompted, Skipped)
    assert tokenizer.convert_ids_to_tokens(unprompted.ids[: unprompted.split]) == ["<bos>", "the", "Ġking", "<eos>"]
    cut = Classes(CLASSES.names, truncate=True)
    read = encode_for(cut, tokenizer, text("the king is old", 0), append_eos=True, max_tokens=4)
    assert tokenizer.convert_ids_to_tokens(read.ids) == ["<bos>", "the", "Ġking", "<eos>"]


def ids_of(words: str) -> list[int]:
    return list(TOKENIZER(words)["input_ids"])


def pair(prompt: object, chosen: object, rejected: object) -> Document:
    """With a prompt, unless it is `...`."""
    named = prompt is not ...
    return Document("d", prompt if named else None, chosen, has_prompt=named, rejected=rejected, reference=0.5)


def test_a_pair_is_two_sequences_of_which_the_completions_are_targets_where_they_differ() -> None:
    found = encode_for(PAIRS, TOKENIZER, pair("the king", " is old", " is the sea"), append_eos=True, max_tokens=8)
    end = TOKENIZER.eos_token_id
    assert found.ids == (*ids_of("the king is old"), end, *ids_of("the king is the sea"), end)
    assert found.targets == (False, False, False, True, True, False, False, False, True, True, True)
    (window,) = found.windows(8)
    assert window.spans == ((0, 5), (5, 11)) and window.width == 12
    batch = to_batch([window])
    assert batch.input_ids.shape == (1, 12) and batch.apart(batch.input_ids).tolist() == [
        [*ids_of("the king is old"), end, 0],
        [*ids_of("the king is the sea"), end],
    ]
    assert batch.predicts.nonzero()[:, 1].tolist() == [2, 3, 8, 9, 10]
    assert batch.reference is not None and batch.reference.tolist() == [0.5]


def test_a_prompt_that_both_repeat_is_as_one_that_is_named() -> None:
    named = encode_for(PAIRS, TOKENIZER, pair("the king", " is old", " was the sea"), True, None)
    repeated = encode_for(PAIRS, TOKENIZER, pair(..., "the king is old", "the king was the sea"), True, None)
    assert (named.ids, named.targets) == (repeated.ids, repeated.targets)


def test_the_two_sequences_of_a_pair_apart() -> None:
    found = encode_for(Pairs(0.1, apart=True), TOKENIZER, pair("the", " king", " king is old"), False, None)
    windows = list(found.windows(64))
    assert [(window.key.window, window.ids) for window in windows] == [(1, tuple(ids_of("the king is old")))]
    both = encode_for(Pairs(0.1, apart=True), TOKENIZER, pair("the", " king", " king is old"), True, None)
    assert [window.key.window for window in both.windows(64)] == [0, 1]


@pytest.mark.parametrize("prompt_in", ["prompt", "both"])
def test_conversations_are_chosen_and_rejected_too(prompt_in: str) -> None:
    tokenizer = models.build_tokenizer(bos=True)
    tokenizer.chat_template = PLAIN + PROMPT
    before = [{"role": "user", "content": "the sea"}]
    answers = [[{"role": "assistant", "content": words}] for words in ("is green", "is old the")]
    if prompt_in == "prompt":
        document = pair(before, *answers)
    else:
        document = pair(..., *([*before, *answer] for answer in answers))
    found = encode_for(PAIRS, tokenizer, document, append_eos=True, max_tokens=None)
    assert not isinstance(found, Skipped)
    chosen = tuple(zip(found.ids[: found.split], found.targets[: found.split], strict=True))
    unknown, end, bos = tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id
    words = list(tokenizer(" the sea is green", add_special_tokens=False)["input_ids"])
    asked = [bos, unknown, *words[:2], end, bos, unknown, words[2]]
    assert chosen == (*((token, False) for token in asked), (words[3], True), (end, True))
    expected = "user: the sea[chosen] assistant: is green" if prompt_in == "prompt" else "[chosen] user: the sea"
    assert as_text(PAIRS, document, TOKENIZER).replace("\n\n", "").startswith(expected)


UNTEMPLATED = pair([], [{"role": "assistant", "content": "the"}], [{"role": "assistant", "content": "a"}])
NO_PAIR = {
    "chosen is null": pair("the", None, "a"),
    "rejected is empty": pair("the", "a", ""),
    "prompt is null": pair(None, "a", "b"),
    "rejected is not text but int": pair("the", "a", 3),
    "chosen and rejected do not differ": pair("the", " king", " king"),
    "longer than max_tokens (6), and a preference is of whole sequences": pair("the king", " is", " is" * 7),
    "chosen is a conversation, and its prompt is not": pair("the", [{"role": "assistant", "content": "a"}], "b"),
    "chosen: no message is the assistant's": pair([], [{"role": "user", "content": "a"}], "b"),
    "chosen: message 0 is not a mapping but str": pair(..., ["a"], ["b"]),
    "chosen: message 0 is not valid Unicode": pair([], [{"role": "\ud800", "content": "a"}], "b"),
    "chosen is a conversation, and the tokenizer has no chat template": UNTEMPLATED,
}


@pytest.mark.parametrize("reason", NO_PAIR)
def test_what_is_no_pair_is_skipped_with_a_reason(reason: str) -> None:
    assert encode_for(PAIRS, TOKENIZER, NO_PAIR[reason], True, 6) == Skipped("d", reason)


def test_of_means_all_of_a_completion_counts_also_what_both_begin_with() -> None:
    found = encode_for(MEANS, TOKENIZER, pair("the king", " is old", " is the sea"), append_eos=True, max_tokens=8)
    assert found.targets == (False, False, True, True, True, False, False, True, True, True, True)
    (window,) = found.windows(8)
    assert to_batch([window]).length_normalised
    unprompted = encode_for(MEANS, TOKENIZER, pair("", "the king", "the sea"), append_eos=False, max_tokens=8)
    assert unprompted.targets == (False, True, False, True)  # nothing predicts a first token


def talk(*said: str) -> list[dict[str, str]]:
    """Turns of the user and the assistant in turn."""
    return [{"role": ("user", "assistant")[n % 2], "content": words} for n, words in enumerate(said)]


def chatting(template: str) -> Any:
    tokenizer = models.build_tokenizer(bos=True)
    tokenizer.chat_template = template
    return tokenizer


SYSTEM = [{"role": "system", "content": "old"}]
# Where each conversation's completion begins; its tokens are the assistant's from there on.
TALKS: dict[str, tuple[Document, int]] = {
    "one question": (pair(..., talk("the sea", "is green"), talk("the sea", "is old the")), 1),
    "a talk before it": (pair(..., talk("the", "a", "sea", "is old"), talk("the", "a", "sea", "is the")), 3),
    "another talk before it": (pair(..., talk("the", "a", "sea", "is"), talk("the", "is", "sea", "is")), 1),
    "one that goes on": (pair(..., talk("the", "a"), talk("the", "a", "sea", "is")), 1),
    "a named prompt": (pair(talk("the"), talk("the", "a")[1:], talk("the", "is")[1:]), 1),
    "of a named prompt the answers": (pair(talk("the", "a", "sea"), talk("", "a")[1:], talk("", "is")[1:]), 3),
    "no question": (pair(..., SYSTEM + talk("", "the sea")[1:], SYSTEM + talk("", "the king")[1:]), 0),
}


@pytest.mark.parametrize("template", [PLAIN + PROMPT, MARKED], ids=["plain", "marked"])
@pytest.mark.parametrize("case", TALKS)
def test_of_means_the_prompt_is_the_turns_that_both_share_up_to_the_users_last(case: str, template: str) -> None:
    document, since = TALKS[case]
    tokenizer = chatting(template)
    found = encode_for(MEANS, tokenizer, document, append_eos=True, max_tokens=None)
    assert not isinstance(found, Skipped)
    before = document.prompt if document.has_prompt else []
    for part, answer in zip(found.parts, (document.text, document.rejected), strict=True):
        own = [turn["content"] for turn in [*before, *answer][since:] if turn["role"] == "assistant"]
        wanted = [t for words in own for t in tokenizer(f" {words}<eos>", add_special_tokens=False)["input_ids"]]
        assert [t for t, target in zip(found.ids[part], found.targets[part], strict=True) if target] == wanted


ENDED = MARKED + "<eos>"
OF_MEANS = {
    "chosen is text, whose length is counted after its prompt; name the `prompt` column": (pair(..., "a", "b"), MARKED),
    "chosen and rejected do not differ": (pair("the", " king", " king"), MARKED),
    "rejected has no tokens after its prompt": (
        pair(..., talk("the", "a", "sea", "is"), talk("the", "a", "sea")),
        MARKED,
    ),
    "turn 1 does not begin between tokens of the whole conversation": (TALKS["one question"][0], ENDED),
}


@pytest.mark.parametrize("reason", OF_MEANS)
def test_what_has_no_mean_is_skipped_with_a_reason(reason: str) -> None:
    document, template = OF_MEANS[reason]
    assert encode_for(MEANS, chatting(template), document, True, None) == Skipped("d", reason)


def test_a_pair_is_shown_with_what_tells_its_sequences_apart() -> None:
    document = pair("the king", " is old", " is the sea")
    encoded = encode_for(PAIRS, TOKENIZER, document, append_eos=False, max_tokens=None)
    assert as_text(PAIRS, document, TOKENIZER) == "the king\n\n[chosen]  is old\n\n[rejected]  is the sea"
    shown = framed(pieces(TOKENIZER, encoded.ids), frame(PAIRS, document, encoded))
    assert "".join(shown) == "[chosen] the king is old\n\n[rejected] the king is the sea"
