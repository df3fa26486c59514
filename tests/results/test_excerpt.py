"""Excerpts hold the strongest tokens, within their bound, and nothing that moves the text around it."""

import numpy as np
import pytest

from msif_ray.results.excerpt import AROUND, excerpt, visible


def test_a_short_document_is_whole() -> None:
    found = excerpt(["a", "b"], [0.5, -0.25], 40)
    assert [(each.before, each.texts, each.scores) for each in found.segments] == [(0, ["a", "b"], [0.5, -0.25])]
    assert found.after == 0


def test_tokens_of_one_character_are_one(text: str = "é") -> None:
    (segment,) = excerpt(["x", text, "", "", "y"], [1, 2, 3, -1, 5], 40).segments
    assert (segment.texts, segment.scores) == (["x", text, "y"], [1, 4, 5])


def test_what_is_left_out_is_counted_in_tokens() -> None:
    """Not in the characters that several of them make up."""
    texts, scores = ["字", "", ""] * 200, [0.0] * 600
    scores[301] = 1.0  # of the hundredth character
    found = excerpt(texts, scores, 30)
    assert [(each.before, len(each.texts)) for each in found.segments] == [(0, 13), (3 * 79, 17)]
    assert 3 * (13 + 79 + 17) + found.after == 600


@pytest.mark.parametrize("seed", range(3))
def test_a_long_one_keeps_its_beginning_and_its_strongest_tokens(seed: int) -> None:
    scores = np.random.default_rng(seed).standard_normal(5000)
    strong = [100, 2500, 4999]
    scores[strong] = [50, -60, 40]
    found = excerpt([str(place) for place in range(5000)], scores.tolist(), 100)
    shown = [int(text) for segment in found.segments for text in segment.texts]
    assert len(shown) <= 100 and shown == sorted(set(shown))
    assert set(range(AROUND)) | set(strong) <= set(shown)
    assert set(range(2500 - AROUND, 2500 + AROUND + 1)) <= set(shown)
    assert sum(segment.before for segment in found.segments) + len(shown) + found.after == 5000


def test_where_sequences_of_a_pair_begin_and_a_class_is_shown() -> None:
    texts = ["[chosen] a", *["b"] * 600, "\n\n[rejected] c", *["d"] * 600, "e\n\n[label: good]"]
    scores = np.zeros(len(texts))
    scores[[300, 900]] = 1.0
    found = excerpt(texts, scores.tolist(), 45)
    shown = [text for segment in found.segments for text in segment.texts]
    assert [text for text in shown if len(text) > 1] == ["[chosen] a", "↵↵[rejected] c", "e↵↵[label: good]"]
    assert found.after == 0 and len(shown) <= 45 and shown.count("d") == 17


def test_no_token_and_a_token_of_a_megabyte() -> None:
    assert excerpt([], [], 40).segments == []
    (segment,) = excerpt(["-" * 10**6], [1.0], 40).segments
    assert len(segment.texts[0]) < 100


def test_control_characters_are_shown_by_name_and_scripts_stay() -> None:
    assert visible("a\nb\tc\x00\x1b\x7f") == "a↵b⇥c␀␛⟨7F⟩"
    assert visible("safe\u202egnp.exe\u2066") == "safe⟨202E⟩gnp.exe⟨2066⟩"
    for text in ("שלום", "می‌خواهم", "👩‍👩‍👧", "한국어", "e\u0301"):
        assert visible(text) == text
