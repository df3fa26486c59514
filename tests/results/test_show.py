"""`msif show`: queries and their documents in the terminal."""

from io import StringIO
from pathlib import Path

import pytest
from results.finished import KINDS, Finished
from rich.console import Console
from typer.testing import CliRunner

from msif_ray.cli import app
from msif_ray.errors import UserError
from msif_ray.results.show import show
from msif_ray.store import read_json, write_json


def shown(*arguments: str) -> str:
    result = CliRunner(env={"COLUMNS": "100"}).invoke(app, ["show", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return Finished(labels=("two", "one")).write(tmp_path)


def test_all_queries_with_both_sides(run_dir: Path) -> None:
    printed = shown(str(run_dir))
    for text in ("Is it? yes", "Or not? no", "supports", "opposes", "log-likelihood -1 nats (61% per token)"):
        assert text in printed
    scores = Finished(labels=("two", "one")).scores("two")
    best, worst = scores[:, 0].argmax(), scores[:, 0].argmin()
    lines = printed.splitlines()
    assert any(f"{scores[best, 0]:+.4g}" in line and f"doc-{best:02d}" in line for line in lines)
    assert any(f"{scores[worst, 0]:+.4g}" in line and f"doc-{worst:02d}" in line for line in lines)
    assert f"word{best} and more" in printed


def test_without_a_score_it_says_so(tmp_path: Path) -> None:
    printed = shown(str(Finished(documents=0, skipped=[("a", "text is null")]).write(tmp_path)), "--query", "q0")
    assert "(61% per token), no document has a score that is a number; report.html says why" in " ".join(
        printed.split()
    )


def test_of_one_token_and_of_a_class_the_probability_is_not_per_token(run_dir: Path) -> None:
    record = read_json(run_dir / "run.json")
    write_json(run_dir / "run.json", record | {"completion_tokens": {"q0": 1, "q1": 2}})
    printed = shown(str(run_dir))
    assert "log-likelihood -1 nats (37%)," in printed and "log-likelihood -1 nats (61% per token)," in printed


def test_one_query_of_other_scores(run_dir: Path) -> None:
    printed = shown(str(run_dir), "--query", "q1", "--scores", "one", "--top", "1")
    scores = Finished(labels=("two", "one")).scores("one")[:, 1]
    assert "Is it?" not in printed and printed.count("doc-") == 2
    assert f"{scores.max():+.4g}" in printed and f"{scores.min():+.4g}" in printed


def test_it_says_once_what_the_numbers_are(run_dir: Path, tmp_path: Path) -> None:
    printed = " ".join(shown(str(run_dir)).split())
    assert printed.count("leaving one of N out changes it by about -score/N. share: |score| of the sum") == 1
    left_out = {"stage": "pretrain", "responses": {"pretrain": {"kind": "identity"}}}
    printed = shown(str(Finished(changes={"score": [left_out]}).write(tmp_path)))
    assert "-score/N" not in printed and printed.count("scores: products of gradients") == 1


def test_that_there_are_no_more_is_said(run_dir: Path) -> None:
    """The run has three of twelve documents at each end."""
    said = "top.parquet has 3 documents of each side; for more, set `top`"
    assert said in shown(str(run_dir), "--top", "4") and said not in shown(str(run_dir), "--top", "3")


def test_what_queries_ask_is_shown(tmp_path: Path) -> None:
    run_dir = str(Finished(queries=KINDS).write(tmp_path))
    printed = shown(run_dir, "--query", "margin")
    assert "Is it? yes\nrather than  no\n" in printed.replace(" \n", "\n")
    assert "log-likelihood -1 nats above the other's" in printed and "per token" not in printed
    printed = shown(run_dir, "--query", "span")
    assert "Who was it? it was Ann." in printed and "log-likelihood -1 nats (61% per token)" in printed
    assert "user: Really?↵↵assistant: No." in shown(run_dir, "--query", "talk")
    console = Console(record=True, width=100, force_terminal=True, file=StringIO())
    show(run_dir, console, "span")
    assert "\x1b[1;4mAnn\x1b[0m." in console.export_text(styles=True)


def test_scores_per_curvature_norm_are_a_column_where_there_are_such_norms(run_dir: Path, tmp_path: Path) -> None:
    run = Finished(changes={"detail": {"curvature_norm": True}})
    printed, best = shown(str(run.write(tmp_path / "norms"))), run.scores("pretrain")[:, 0].argmax()
    divided = run.scores("pretrain")[best, 0] / (10 * (best % 5 + 1.0))
    line = next(line for line in printed.splitlines() if f"doc-{best:02d}" in line)
    assert f"{divided:+.3g}" in line and "per curvature norm" in printed
    assert "per curvature norm" not in shown(str(run_dir))


def test_escapes_of_a_terminal_and_markup_are_text(tmp_path: Path) -> None:
    run = Finished(tokens_of=lambda number: ["\x1b[31mred", " [bold]b[/bold]"])
    printed = shown(str(run.write(tmp_path)))
    assert "\x1b" not in printed and "␛[31mred [bold]b[/bold]" in printed


def test_ids_are_as_visible_as_texts(tmp_path: Path) -> None:
    run = Finished(queries=(("\x1b]0;q\x07", "Is it?", " yes"), ("a\nb", "Or not?", " no")), log_likelihood=-20.0)
    run_dir = run.write(tmp_path)
    printed = shown(str(run_dir))
    assert "\x1b" not in printed and "␛]0;q␇" in printed and "a↵b" in printed
    with pytest.raises(UserError, match="it has ␛]0;q␇, a↵b"):
        show(run_dir, Console(), "q9")
    result = CliRunner().invoke(app, ["report", str(run_dir)])
    assert "queries (␛]0;q␇, a↵b)" in result.stderr


@pytest.mark.parametrize(("query", "label", "said"), [("q9", None, "--query"), (None, "x", "no scores are called")])
def test_what_is_not_there_is_said(run_dir: Path, query: str | None, label: str | None, said: str) -> None:
    with pytest.raises(UserError, match=said):
        show(run_dir, Console(), query, label)
