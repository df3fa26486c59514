"""report.html in a real browser: what it shows, what it refuses to run, and how it is used."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from results import browser, finished
from results.finished import KINDS, MAPS, Finished, page_data
from typer.testing import CliRunner

from msif_ray.cli import app
from msif_ray.errors import UserError
from msif_ray.results.report import write_report
from msif_ray.results.top import write_top
from msif_ray.store import read_json, write_json

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked=1'>"
WRITTEN = ["שלום עולם, זה מסמך", "مرحبا بالعالم", "世界 你好", "नमस्ते", "👩‍👩‍👧 naïve"]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.launched() as launched:
        yield launched


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 queries of 20 documents at each end, each of 300 tokens."""
    queries = [(f"query-{n:02d}", f"Question {n}?", f" answer {n}") for n in range(50)]
    words = [" the", " river", " stone", " market", " winter"]
    run = Finished(
        queries=queries,
        documents=90,
        labels=("two-stages", "single-stage"),
        top=20,
        tokens_of=lambda number: [f"Doc{number}", *(words[(place * number) % 5] for place in range(299))],
    )
    return write_report(run.write(tmp_path_factory.mktemp("large")))[0]


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Markup where text is expected, a document of ten megabytes, and scripts of all directions."""

    def tokens(number: int) -> list[str]:
        if number == 0:
            return ["x", HOSTILE, " y"]
        if number == 1:
            return [" long"] * 2_000_000
        if number == 2:
            return ["\u202eevil", "\nline", "\x00"]
        if number - 3 < len(WRITTEN):
            return [character for c in WRITTEN[number - 3] for character in (c, *[""] * (len(c.encode()) - 1))]
        return ["plain", " text"]

    run = Finished(
        queries=[(HOSTILE, HOSTILE, f" {HOSTILE}")],
        documents=10,
        top=10,
        tokens_of=tokens,
        id_of=lambda number: f"{number}{HOSTILE}" if number == 0 else f"doc-{number}",
    )
    return write_report(run.write(tmp_path_factory.mktemp("strange")))[0]


def test_the_page_stays_small(large: Path) -> None:
    assert large.stat().st_size < 5e6
    results = page_data(large.read_text(encoding="utf-8"))["scored"][0]["queries"][0]
    assert [each["rank"] for each in results["supports"]] == list(range(1, 21))


def test_what_queries_ask_is_told_apart(chromium: Any, tmp_path: Path) -> None:
    path = write_report(Finished(queries=KINDS).write(tmp_path))[0]
    page = browser.Watched(chromium, path).page
    assert page.locator(".said").inner_text() == "Is it? yes"
    facts = page.locator("#query-facts").inner_text()
    assert "rather than\nno\n" in facts and "log-likelihood above the other's" in facts and "mean prob" not in facts
    page.locator("#queries button").nth(1).click()
    assert page.locator(".said").inner_text() == "Who was it? it was Ann."
    assert page.locator("#completion").inner_text() == "Ann"
    assert "rather" not in page.locator("#query-facts").inner_text()
    page.locator("#queries button").nth(2).click()
    assert page.locator(".said").inner_text() == "user: Really?↵↵assistant: No."
    page.locator("#find-query").fill(" no")
    assert page.locator("#queries-found").inner_text() == "2 found"


def test_a_class_is_called_so(chromium: Any, tmp_path: Path) -> None:
    documents = {"path": "base.jsonl", "text": "text"}
    base = {"name": "pretrain", "model": "models/base", "documents": documents}
    second = {"stage": "tune", "documents": {"path": "tune.jsonl", "text": "text", "label": "label"}}
    run = Finished(
        queries=[("q0", "Good.", "positive")],
        labels=("pretrain", "tune"),
        changes={
            "stages": [base, {"name": "tune", "model": "models/tuned", "objective": "classification"}],
            "queries": {"path": "queries.jsonl", "id": "id", "text": "text", "label": "label"},
            "score": [{"stage": "pretrain"}, second],
        },
    )
    run_dir = run.write(tmp_path)
    write_json(run_dir / "run.json", read_json(run_dir / "run.json") | {"completion_tokens": {"q0": 1}})
    page = browser.Watched(chromium, write_report(run_dir)[0]).page
    shown = page.locator("body").inner_text()
    assert "geometric mean" not in shown and page.locator("dt", has_text="probability").count() == 1
    assert "Supports the class" in shown and "the class’s log-likelihood" in shown
    assert "completion" not in shown.replace("completion_tokens", "")
    assert "probability\n37 %" in page.locator("#query-facts").inner_text().replace("\u00a0", " ")
    printed = CliRunner().invoke(app, ["show", str(tmp_path)], catch_exceptions=False).stdout
    assert "log-likelihood -1 nats (37%)," in printed


def test_it_asks_for_nothing_and_shows_the_first_query(chromium: Any, large: Path) -> None:
    seen = browser.Watched(chromium, large)
    page = seen.page
    assert page.locator("#completion").inner_text() == " answer 0"
    assert page.locator("#supports > li").count() == page.locator("#opposes > li").count() == 20
    assert "documents scored" in page.locator("#query-facts").inner_text()
    assert page.locator("#heat td:not(.sum)").count() == len(MAPS)
    assert page.locator("#distribution .tick-supports").count() == 20
    footer = page.locator("footer").inner_text()
    for text in ("1,000 documents, 20,000 tokens", "90 of 90", "proximal, α 0.1", "damped inverse", "models/<tuned>"):
        assert text in footer
    seen.assert_quiet()


def test_shares_and_shades_are_those_of_the_scores(chromium: Any, large: Path) -> None:
    results = page_data(large.read_text(encoding="utf-8"))["scored"][0]["queries"][0]
    first = results["supports"][0]
    page = browser.Watched(chromium, large).page
    card = page.locator("#supports > li").first
    total = Finished(queries=[("", "", "")] * 50, documents=90, labels=("two-stages",)).scores("two-stages")[:, 0]
    assert first["share"] == pytest.approx(total.max() / abs(total).sum(), rel=1e-4)
    assert f"{first['score']:.3g}" in card.locator(".score").inner_text()
    scores = [score for segment in first["segments"] for score in segment[2]]
    shaded = card.locator(".text span.p8")
    assert shaded.count() >= 1 and max(map(abs, scores)) == 1000
    opposing = card.locator(".text span[class^=n]").first
    assert "underline" in opposing.evaluate("node => getComputedStyle(node).textDecorationLine")
    assert opposing.get_attribute("title").startswith("−")


def test_search_and_sort_work_without_a_server(chromium: Any, large: Path) -> None:
    seen = browser.Watched(chromium, large)
    page = seen.page
    page.get_by_label("Search 50 queries").fill("query-4")
    assert page.locator("#queries li:visible").count() == 10
    assert page.locator("#queries-found").inner_text() == "10 found"
    page.locator("#queries li:visible button").first.click()
    assert page.locator("#query-title").inner_text() == "query-40" and page.url.endswith("#0/40")
    page.get_by_label("Scores", exact=True).select_option(label="single-stage")
    assert page.url.endswith("#1/40")
    ids = page.locator("#supports h4").all_inner_texts()
    page.get_by_label("Order").select_option("id")
    assert page.locator("#supports h4").all_inner_texts() == sorted(ids) != ids
    page.get_by_label("Search documents").fill(ids[3])
    assert page.locator("#supports h4").all_inner_texts() == [ids[3]]
    assert page.locator("#documents-found").inner_text().endswith("of 40 documents")
    page.get_by_label("Search documents").fill("nothing has this")
    assert "None of the shown documents" in page.locator("#supports").inner_text()
    page.reload()
    assert page.locator("#query-title").inner_text() == "query-40"  # the address remembers


def test_it_is_used_by_keyboard(chromium: Any, large: Path) -> None:
    page = browser.Watched(chromium, large).page
    focused = "() => document.activeElement.textContent || document.activeElement.id"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "Skip to the query"
    page.keyboard.press("Enter")
    assert page.evaluate("() => document.activeElement.id") == "query"
    page.locator("#queries button").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert "query-02" in page.evaluate(focused)
    assert page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert page.locator("#query-title").inner_text() == "query-02"
    assert page.locator("#queries [aria-current=true]").inner_text().startswith("query-02")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", ["large", "strange"])
def test_a_screen_reader_finds_its_way(
    chromium: Any, large: Path, strange: Path, scheme: str, which: str, tmp_path: Path
) -> None:
    """By axe-core's rules, contrast among them."""
    from axe_playwright_python.sync_playwright import Axe

    page = browser.Watched(chromium, large if which == "large" else strange, color_scheme=scheme).page
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_markup_is_shown_as_text(chromium: Any, strange: Path) -> None:
    seen = browser.Watched(chromium, strange)
    page = seen.page
    assert page.locator("#query-title").inner_text() == HOSTILE
    assert page.locator("#prompt").inner_text() == HOSTILE
    assert any(HOSTILE in text for text in page.locator("h4").all_inner_texts())
    assert any("<script>window.hacked = 1</script>" in text for text in page.locator(".text").all_inner_texts())
    assert page.evaluate("() => window.hacked") is None
    assert page.locator("img").count() == 0 and page.locator("script").count() == 2
    seen.assert_quiet()


def test_a_script_that_got_in_would_not_run(chromium: Any, strange: Path) -> None:
    page = browser.Watched(chromium, strange).page
    page.evaluate("() => document.body.insertAdjacentHTML('beforeend', `<img src=x onerror='window.hacked=1'>`)")
    add = "const added = document.createElement('script'); added.textContent = 'window.hacked = 1';"
    page.evaluate(f"() => {{ {add} document.body.append(added) }}")
    page.wait_for_timeout(200)
    assert page.evaluate("() => window.hacked") is None


def test_a_document_of_ten_megabytes_is_an_excerpt(chromium: Any, strange: Path) -> None:
    assert strange.stat().st_size < 300_000
    began = time.monotonic()
    page = browser.Watched(chromium, strange).page
    card = page.locator("li:has(> article):has(h4:text-is('doc-1'))").first
    left_out = [int(gap.replace(",", "").split()[0]) for gap in card.locator(".gap").all_inner_texts()]
    assert 2_000_000 - 240 <= sum(left_out) < 2_000_000
    assert time.monotonic() - began < 20


def test_all_scripts_are_characters(chromium: Any, strange: Path) -> None:
    page = browser.Watched(chromium, strange).page
    shown = page.locator(".text").all_inner_texts()
    for text in WRITTEN:
        assert text in shown
    assert "\ufffd" not in page.content()
    hebrew = page.locator(".text", has_text="מסמך").first
    assert hebrew.evaluate("node => getComputedStyle(node).direction") == "rtl"
    assert "⟨202E⟩evil↵line␀" in shown


def test_what_is_left_out_of_hebrew_is_told_from_left_to_right(chromium: Any, tmp_path: Path) -> None:
    path = write_report(Finished(tokens_of=lambda number: [" מילה"] * 1000).write(tmp_path))[0]
    page = browser.Watched(chromium, path).page
    left = """(node, place) => {
        const range = new Range();
        range.setStart(node.firstChild, place);
        range.setEnd(node.firstChild, place + 1);
        return range.getBoundingClientRect().left;
    }"""
    gaps = page.locator(".text .gap").all()
    assert gaps
    for gap in gaps:
        last = len(gap.inner_text()) - 1
        assert gap.evaluate(left, 0) < gap.evaluate(left, last)
    assert {text.evaluate("node => getComputedStyle(node).direction") for text in page.locator(".text").all()} == {
        "rtl"
    }


def test_it_shows_which_stage_an_answer_comes_from(chromium: Any, tmp_path: Path) -> None:
    from axe_playwright_python.sync_playwright import Axe

    tune = {"stage": "tune", "documents": {"path": "tune.jsonl", "text": "text"}}
    entries = [{"stage": "pretrain"}, tune, {"stage": "pretrain", "name": "alone", "max_tokens": 9}]
    entries[2]["responses"] = {"tune": {"kind": "identity"}}
    run = Finished(labels=("pretrain", "tune", "alone"), changes={"score": entries})
    seen = browser.Watched(chromium, write_report(run.write(tmp_path))[0])
    supports = [run.scores(label)[:, 0].clip(0).mean() for label in ("pretrain", "tune")]
    lines = seen.page.locator("#stages tbody tr").all_inner_texts()
    for line, label, own in zip(lines, ("pretrain", "tune"), supports, strict=True):
        assert line.startswith(label) and f"{100 * own / sum(supports):.0f} %" in line.replace("\u00a0", " ")
    bars = seen.page.locator("#stages .share i").evaluate_all("nodes => nodes.map((node) => node.style.width)")
    assert sum(float(width.rstrip("%")) for width in bars) == pytest.approx(100, abs=0.01)
    assert "What a stage's share is" in seen.page.locator("footer").inner_text()
    found = Axe().run(seen.page)
    assert found.violations_count == 0, found.generate_report()
    seen.page.get_by_label("Scores", exact=True).select_option(label="alone")
    assert "compared with no other stage" in seen.page.locator("#stages").inner_text()
    seen.assert_quiet()


def test_a_stage_has_no_share_where_no_document_supports(
    chromium: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = -np.random.default_rng(0).lognormal(size=(12, 2)).astype(np.float32)
    monkeypatch.setattr(Finished, "scores", lambda self, label: scores)
    tune = {"stage": "tune", "documents": {"path": "tune.jsonl", "text": "text"}}
    run = Finished(labels=("pretrain", "tune"), changes={"score": [{"stage": "pretrain"}, tune]})
    seen = browser.Watched(chromium, write_report(run.write(tmp_path))[0])
    shares = seen.page.locator("#stages tbody td:nth-child(2)").all_inner_texts()
    assert [share.strip() for share in shares] == ["–", "–"]
    seen.assert_quiet()


def of_many_experts(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose model has 40 experts in each of 48 layers; of many queries, in doubt, and with long tokens."""
    kinds = ("attention", *(f"mlp.experts.{expert}.up" for expert in range(40)))
    monkeypatch.setattr(finished, "MAPS", [f"model.layers.{layer}.{kind}" for layer in range(48) for kind in kinds])
    queries = [(f"query-{number:02d}", "Is it?", " yes") for number in range(60)]
    run = Finished(queries=queries, top=1, log_likelihood=-20.0, tokens_of=lambda number: ["x" * 79, " " * 79, "."])
    return write_report(run.write(run_dir))[0]


def test_it_fits_the_window_and_ends_with_what_it_shows(
    chromium: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = browser.Watched(chromium, of_many_experts(tmp_path, monkeypatch)).page
    for width in (1280, 400):
        page.set_viewport_size({"width": width, "height": 900})
        found = page.evaluate("() => [document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
        end = page.evaluate("() => document.querySelector('footer').getBoundingClientRect().bottom + scrollY")
        assert found == [width, pytest.approx(end, abs=2)]


def test_shares_of_thousands_of_maps_add_up(chromium: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = browser.Watched(chromium, of_many_experts(tmp_path, monkeypatch)).page
    kept = [("side", "==", "highest"), ("query_id", "==", "query-00")]
    shares = np.array(pq.read_table(tmp_path / "top.parquet", filters=kept)["module_scores"].to_pylist()).sum(0)
    expected = 100 * shares.reshape(48, 41).sum(0) / np.abs(shares).sum()
    shown = [float(text.replace("−", "-")) for text in page.locator("#heat .sum").all_inner_texts()]
    assert shown == pytest.approx(expected.tolist(), abs=0.55)  # whole numbers are shown


def test_on_paper_it_is_light_whole_and_shaded(chromium: Any, large: Path) -> None:
    page = browser.Watched(chromium, large, color_scheme="dark").page
    page.emulate_media(media="print")
    style = "(node, name) => getComputedStyle(node)[name]"
    assert page.locator("body").evaluate(style, "backgroundColor") == "rgb(246, 247, 249)"
    assert page.locator(".text .p8").first.evaluate(style, "printColorAdjust") == "exact"
    assert page.locator("#heat").evaluate(style, "overflowX") == "visible"
    for name in (".said", ".text"):
        assert page.locator(name).first.evaluate(style, "maxHeight") == "none"


def test_of_many_reasons_the_commonest_are_told(tmp_path: Path) -> None:
    skipped = [(f"s{number}", f"label {number} is no class") for number in range(900)] + [("t", "text is null")] * 2
    page = write_report(Finished(skipped=skipped).write(tmp_path))[0].read_text(encoding="utf-8")
    assert page.count("is no class") == 4 and "896 more reasons, in skipped.parquet" in page
    assert "2: text is null" in page


def test_without_scripts_it_says_where_the_data_is(chromium: Any, large: Path) -> None:
    page = browser.Watched(chromium, large, java_script_enabled=False).page
    assert "top.parquet" in page.locator("main").inner_text()


def test_a_query_without_scores_and_one_side_alone(chromium: Any, tmp_path: Path) -> None:
    run = Finished(queries=[("q", "", " x")], documents=1, top=1)
    seen = browser.Watched(chromium, write_report(run.write(tmp_path))[0])
    empty = seen.page.locator("#opposes" if run.scores("pretrain")[0, 0] > 0 else "#supports")
    assert "No document has a score on this side" in empty.inner_text()
    seen.assert_quiet()


def test_documents_have_their_norms_in_the_inverse_curvature_where_the_run_has_them(tmp_path: Path) -> None:
    run = Finished(changes={"detail": {"curvature_norm": True}})
    pages = [write_report(each.write(tmp_path / name))[0].read_text() for name, each in (("a", run), ("b", Finished()))]
    with_norms, without = (page_data(page)["scored"][0]["queries"][0]["supports"][0] for page in pages)
    assert with_norms["curvature_norm"] == 10 * with_norms["norm"] and "curvature_norm" not in without
    assert ["per-curvature-norm" in page.partition("<script")[0] for page in pages] == [True, False]


def test_documents_have_no_norms_where_the_run_has_none(tmp_path: Path) -> None:
    page = write_report(Finished(changes={"detail": {"norm": False}}).write(tmp_path))[0].read_text()
    shown = [each for query in page_data(page)["scored"][0]["queries"] for each in query["supports"]]
    assert shown and not any("norm" in each for each in shown)
    assert "per-norm" not in page.partition("<script")[0]


def test_a_norm_and_a_share_that_are_no_numbers(tmp_path: Path) -> None:
    """Of a score that is one: a norm is the root of squares, which overflow far sooner."""
    path = Finished().write(tmp_path) / "top.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[0] |= {"norm": math.inf, "token_scores": [math.nan, 0.5, 0.5], "module_scores": [math.inf] + 8 * [1.0]}
    write_top(tmp_path, rows, 3)
    (first, *_) = page_data(write_report(tmp_path)[0].read_text(encoding="utf-8"))["scored"][0]["queries"][0][
        "supports"
    ]
    assert first["id"] == rows[0]["doc_id"] and "norm" not in first
    assert first["segments"][0][2] == [0, 1000, 1000] and first["maps"] == [[1, 0.125], [2, 0.125], [3, 0.125]]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run\.json there"):
        write_report(tmp_path)
    Finished().write(tmp_path)
    for name in ("top.parquet", "statistics.parquet"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        with pytest.raises(UserError, match="finish the run"):
            write_report(tmp_path)
        (tmp_path / name).write_bytes(content)


def test_the_command_writes_it_and_prints_what_is_doubtful(tmp_path: Path) -> None:
    Finished(log_likelihood=-20.0).write(tmp_path)
    result = CliRunner().invoke(app, ["report", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0 and result.stdout.strip() == str(tmp_path / "report.html")
    assert "note: The model did not prefer this completion: 2 of 2 queries (q0, q1)" in result.stderr
    assert "The model did not prefer this completion" in (tmp_path / "report.html").read_text(encoding="utf-8")
