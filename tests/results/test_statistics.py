"""The statistics of scores equal those of all scores at once."""

from pathlib import Path

import numpy as np
import pytest

from msif_ray.results import parts
from msif_ray.results.statistics import BINS, _histograms, _moments, _Rows, _Sums, read_statistics, write_statistics


def test_they_are_those_of_all_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "GROUP_ROWS", 20)
    random = np.random.default_rng(0)
    scores = random.standard_normal((40, 3)).astype(np.float32)
    scores[3, 1] = np.nan
    tokens = random.integers(2, 90, 40)
    for block, some in (("0", slice(0, 25)), ("1", slice(25, 40))):
        ids = [f"d{number}" for number in range(40)][some]
        path = parts.part_path(tmp_path, "s", block)
        parts.write_part(path, ["a", "b", "c"], ids, scores[some], np.ones(40)[some], tokens[some].tolist(), [], {})
    write_statistics(tmp_path, ["s"])
    found = read_statistics(tmp_path)
    assert list(found) == [("s", "a"), ("s", "b"), ("s", "c")]
    for column, row in enumerate(found.values()):
        kept = np.isfinite(scores[:, column])
        own, lengths = scores[kept, column].astype(float), tokens[kept]
        assert row["documents"] == len(own) and row["lowest"] == own.min() and row["highest"] == own.max()
        assert row["mean"] == pytest.approx(own.mean()) and row["deviation"] == pytest.approx(own.std())
        assert row["total_absolute"] == pytest.approx(np.abs(own).sum())
        assert row["total_positive"] == pytest.approx(own[own > 0].sum())
        assert row["total_negative"] == pytest.approx(own[own < 0].sum())
        assert row["length_correlation"] == pytest.approx(np.corrcoef(np.abs(own), lengths)[0, 1])
        assert row["mean_tokens"] == pytest.approx(lengths.mean())
        assert row["histogram"] == np.histogram(own, BINS)[0].tolist()


def test_equal_scores_have_no_correlation_and_one_bin(tmp_path: Path) -> None:
    path = parts.part_path(tmp_path, "s", "0")
    parts.write_part(path, ["a"], ["x", "y"], np.ones((2, 1)), np.ones(2), [2, 3], [], {})
    write_statistics(tmp_path, ["s"])
    row = read_statistics(tmp_path)["s", "a"]
    assert row["length_correlation"] is None and row["deviation"] == 0 and sum(row["histogram"]) == 2


def add(sums: _Sums, scores: np.ndarray, tokens: int) -> None:
    """A part with scores of one query, of documents of so many tokens each."""
    rows = _Rows(["a"], np.array([0]), scores.astype(float), np.full(len(scores), float(tokens)))
    lowest, highest = (rows.of_each([end]) for end in sums.ends)
    sums.add(_moments(rows, lowest)[0], _histograms(rows, lowest, highest)[0])


@pytest.mark.parametrize("count", [1000, 1_000_003])
def test_the_deviation_is_not_what_rounding_leaves(count: int) -> None:
    """Of equal scores it is zero, and of those far from zero that of their distances."""
    for spread in (0, 2):
        scores = (123.4 + 1e-5 * np.random.default_rng(0).integers(-spread, spread + 1, count)).astype(np.float32)
        sums = _Sums((float(scores.min()), float(scores.max())))
        for part in np.array_split(scores, 37):
            add(sums, part, 5)
        assert sums.row("s", "a")["deviation"] == pytest.approx(scores.astype(float).std() if spread else 0, abs=1e-15)


def test_what_rounding_leaves_of_equal_lengths_is_no_spread() -> None:
    count, tokens = 247_778, 7176  # of which (Σn)²/N is not Σn² in float64
    sums = _Sums((-1.0, 1.0))
    add(sums, np.random.default_rng(0).standard_normal(count).astype(np.float32), tokens)
    assert sums.row("s", "a")["length_correlation"] is None
