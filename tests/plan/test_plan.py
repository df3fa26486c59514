"""The plan of a small run: what it says, and that it leaves nothing behind."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import models
import pytest
import yaml
from cluster import runs
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from msif_ray.cli import app
from msif_ray.cluster.sharding import gathered
from msif_ray.config import parse_run
from msif_ray.errors import UserError
from msif_ray.plan import trials
from msif_ray.plan.make import Plan, make_plan
from msif_ray.plan.measure import Request
from msif_ray.plan.report import print_plan

Description = dict[str, Any]


@pytest.fixture(scope="module")
def description(tmp_path_factory: pytest.TempPathFactory) -> Description:
    return runs.two_stages(tmp_path_factory.mktemp("run"), "run", factor_memory=40_000)


@pytest.fixture(scope="module")
def plan(description: Description) -> Plan:
    return make_plan(parse_run(description), measured=False)


def stored(plan: Plan, name: str) -> float:
    return next(each.bytes for each in plan.stored if each.name == name)


def printed(plan: Plan, width: int) -> list[str]:
    written = io.StringIO()
    print_plan(plan, Console(file=written, width=width))
    return written.getvalue().splitlines()


def test_words_stay_whole_at_80_columns(plan: Plan) -> None:
    wide, narrow = printed(plan, 200), printed(plan, 80)
    assert max(map(len, narrow)) <= 80
    missing = Counter(" ".join(wide).split()) - Counter(" ".join(narrow).split())
    assert {word for word in missing if set(word) != {"─"}} <= {"device-hours", "core-hours", plan.run_dir}


def test_documents_and_steps(plan: Plan) -> None:
    usable = [row["text"] for row in runs.BASE if row["text"] and row["id"] != "short"]
    corpora = {corpus.name: corpus for corpus in plan.corpora}
    pretrain = corpora["pretrain, scored"]
    assert (pretrain.documents, pretrain.skipped, pretrain.sampled) == (len(runs.BASE), 2, None)
    assert pretrain.tokens == sum(len(text.split()) + 1 for text in usable)
    assert plan.pairs == len(runs.QUERIES) * (len(usable) + len(runs.TUNING))
    assert [step.name for step in plan.steps] == [
        "pretrain: covariance",
        "pretrain: eigendecomposition",
        "pretrain: correction",
        "tune: covariance",
        "tune: eigendecomposition",
        "tune: correction",
        "queries: gradients",
        "queries: carried back",
        "pretrain: scores",
        "tune: scores",
        "pretrain: top documents",
        "tune: top documents",
    ]
    assert all(step.flops > 0 and step.hours is None for step in plan.steps)


def test_what_is_kept_of_the_covariances_spares_the_corrections_their_passes(description: Description) -> None:
    """With room for all that is kept no pass is left, and with room for half of it half."""

    def corrections(memory: int) -> tuple[float, float]:
        cluster = description["cluster"] | {"activations_memory": memory}
        steps = {step.name: step for step in make_plan(parse_run(description | {"cluster": cluster}), False).steps}
        covariance, correction = steps["pretrain: covariance"], steps["pretrain: correction"]
        assert covariance.memory is not None
        return correction.flops, covariance.memory

    (passes, bare), (half, with_half), (none, full) = (corrections(memory) for memory in (0, 40_000, 2**30))
    kept = full - bare
    assert none < half < passes
    assert with_half - bare == 40_000 < kept
    assert (passes - half) / (passes - none) == pytest.approx(40_000 / kept)


@pytest.mark.parametrize(("gpus", "copies"), [(0, 3), (1, 1)])
def test_a_rank_of_a_sharded_model_has_its_shard_and_what_is_gathered(tmp_path: Path, gpus: int, copies: int) -> None:
    """On CPUs three times: DeepSpeed's buffer, gloo's, and the weight (see tests/cluster/test_sharded_memory.py)."""
    models.save_pair(tmp_path, "gpt_neox", seed=5, tokenizer=models.build_tokenizer(pad=True), layers=16)
    description = runs.two_stages(tmp_path, "run")

    def memory(ranks: int) -> float:
        cluster = description["cluster"] | {"ranks_per_replica": ranks, "gpus_per_rank": gpus}
        plan = make_plan(parse_run(description | {"cluster": cluster}), measured=False)
        found = next(step.memory for step in plan.steps if step.name == "pretrain: scores")
        assert found is not None
        return found

    sizes = [weight.numel() for weight in models.load(tmp_path / "stage0")[0].parameters()]
    held_by_others = sum(sizes) - sum(sizes) / 4 - copies * gathered(sizes)[0]
    assert memory(1) - memory(4) == pytest.approx(8 * held_by_others) and held_by_others > 0


def test_documents_with_a_token_that_the_model_has_not_are_not_usable(tmp_path: Path) -> None:
    vocabulary = len(models.VOCABULARY) - 1
    models.save_pair(tmp_path, "gpt_neox", seed=5, tokenizer=models.build_tokenizer(pad=True), vocab=vocabulary)
    description = runs.two_stages(tmp_path, "run")
    word = models.VOCABULARY[-1].replace("Ġ", " ")
    unknown = {"id": "unknown", "text": f"the{word}"}
    known = [row for row in runs.BASE if word not in (row["text"] or "")]
    description["stages"][0]["documents"]["path"] = runs.write_lines(tmp_path / "known.jsonl", [*known, unknown])
    queries = [{"id": "q", "prompt": "the", "completion": "the"}]
    description["queries"]["path"] = runs.write_lines(tmp_path / "the.jsonl", queries)
    plan = make_plan(parse_run(description), measured=False)
    scored = next(corpus for corpus in plan.corpora if corpus.name == "pretrain, scored")
    assert (scored.documents, scored.skipped) == (len(known) + 1, 3)


def test_a_model_without_attention_heads_is_planned_with_a_note(tmp_path: Path) -> None:
    config = AutoConfig.for_model("rwkv", hidden_size=8, num_hidden_layers=2, vocab_size=len(models.VOCABULARY))
    for stage in ("stage0", "stage1"):
        models.save(AutoModelForCausalLM.from_config(config), models.build_tokenizer(), tmp_path / stage)
    plan = make_plan(parse_run(runs.two_stages(tmp_path, "run")), measured=False)
    assert all(step.flops > 0 for step in plan.steps)
    assert any("pretrain, tune: the model has no attention heads" in note for note in plan.notes)


def test_entries_that_share_a_pass_are_planned_as_one(description: Description) -> None:
    score = [{"stage": "pretrain"}, {"stage": "pretrain", "name": "other", "responses": {"tune": {"kind": "identity"}}}]
    plan = make_plan(parse_run(description | {"score": score}), measured=False)
    names = [step.name for step in plan.steps]
    assert "pretrain, other: scores" in names and "other: scores" not in names


def test_an_index_is_planned_and_scores_from_it_take_no_pass(description: Description, plan: Plan) -> None:
    indexed = description | {
        "index": [{"stage": "pretrain", "rank": 2}],
        "score": [{"stage": "pretrain", "index": description["run_dir"]}],
    }
    found = make_plan(parse_run(indexed), measured=False)
    steps = {step.name: step for step in found.steps}
    assert steps["pretrain: index"].flops > 0 and steps["pretrain: index"].passes == plan.groups[0].passes
    exact = next(step for step in plan.steps if step.name == "pretrain: scores")
    assert 0 < steps["pretrain: scores"].flops < 0.5 * exact.flops
    assert stored(found, "index of pretrain, at most") > 0


def test_scores_by_token_take_no_pass_more(description: Description, plan: Plan) -> None:
    found = make_plan(parse_run(description | {"detail": {"tokens": True, "modules": True}}), measured=False)
    assert [step.name for step in found.steps] == [step.name for step in plan.steps]
    assert next(step for step in found.steps if step.name == "pretrain: scores").flops > 0


def test_norms_in_the_inverse_curvature_are_planned(description: Description, plan: Plan) -> None:
    """Like the products of a correction; factors within what they may take, with a note where that is too little."""
    wanted = description | {"detail": {"curvature_norm": True, "normalised": True}}
    found = make_plan(parse_run(wanted), measured=False)
    steps, before = ({step.name: step for step in each.steps} for each in (found, plan))
    covariance, correction = before["pretrain: covariance"], before["pretrain: correction"]
    added = steps["pretrain: scores"].flops - before["pretrain: scores"].flops
    assert 0 < added < correction.flops and covariance.passes > 1
    more = [(steps[f"{s}: scores"].memory or 0) - (before[f"{s}: scores"].memory or 0) for s in ("pretrain", "tune")]
    assert more == [40_000, 40_000]  # cluster.factor_memory
    assert sum("detail.curvature_norm" in note and "the rest is read from" in note for note in found.notes) == 2
    roomy = wanted | {"cluster": description["cluster"] | {"factor_memory": 2**30}}
    assert not any("detail.curvature_norm" in note for note in make_plan(parse_run(roomy), measured=False).notes)


def test_candidates_are_planned(description: Description, plan: Plan) -> None:
    candidates = {"method": "bm25", "top": 2}
    chosen = description | {"score": [{"stage": "pretrain", "candidates": candidates}, {"stage": "tune"}]}
    found = make_plan(parse_run(chosen), measured=False)
    assert found.pairs == len(runs.QUERIES) * (2 + len(runs.TUNING))
    steps = {step.name: step for step in found.steps}
    exact = next(step for step in plan.steps if step.name == "pretrain: scores")
    assert steps["pretrain: scores"].documents == 2 * len(runs.QUERIES)
    assert 0 < steps["pretrain: scores"].flops < 0.6 * exact.flops


def write(folder: Path, description: Description) -> str:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(description))
    return str(path)


def test_products_of_a_solver_are_planned(description: Description, plan: Plan) -> None:
    solved = json.loads(json.dumps(description))
    solved["stages"][0]["solver"] = {"kind": "cg", "iterations": 5, "documents": 8}
    found = make_plan(parse_run(solved), measured=False)
    step = next(step for step in found.steps if step.name == "queries: pretrain: conjugate gradients")
    # Three queries and one entry, a product in each iteration.
    assert step.passes == 3 * 5 and step.documents == 8 and step.flops > 0 and step.memory
    assert not any("conjugate" in each.name for each in plan.steps)
    others = [each.flops for each in plan.steps if each.name != "queries: carried back"]
    changed = ("queries: pretrain: conjugate gradients", "queries: carried back")
    assert [each.flops for each in found.steps if each.name not in changed] == others
    assert stored(found, "conjugate gradients, at most") > 0


def test_the_command_measures_and_leaves_nothing_behind(description: Description, tmp_path: Path) -> None:
    one_stage = {
        "detail": {"curvature_norm": True},
        "cluster": description["cluster"] | {"factor_memory": 2**20},
        "run_dir": str(tmp_path / "deep" / "run"),
        "stages": description["stages"][:1],
        "queries": description["queries"] | {"rank": 1},
        "score": [{"stage": "pretrain"}],
    }
    path = write(tmp_path, description | one_stage)
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(app, ["plan", path, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    plan = json.loads(result.stdout)
    assert "thread" in plan["device"] and plan["free"]["pretrain"] > 0
    assert all(step["hours"] > 0 and step["memory"] > 100 * 2**20 for step in plan["steps"])
    assert plan["notes"] == []
    assert sorted(tmp_path.rglob("*")) == before


def test_the_tables_fit_into_100_columns(description: Description, tmp_path: Path) -> None:
    path = write(tmp_path, description)
    result = CliRunner(env={"COLUMNS": "100"}).invoke(app, ["plan", path, "--no-measure"], catch_exceptions=False)
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 100
    for text in ("tokens", "TFLOP", "device-hours", "GiB", "factors of tune", "no hours", "pretrain: correction"):
        assert text in result.stdout
    assert "…" not in result.stdout


def test_a_mistake_in_the_run_is_the_users_error(description: Description, tmp_path: Path) -> None:
    wrong = description | {"run_dir": str(tmp_path / "run"), "modules": ["nothing*"]}
    with pytest.raises(UserError, match="modules: 'nothing\\*' matches no linear map"):
        make_plan(parse_run(wrong))
    assert not (tmp_path / "run").exists()


def test_a_model_that_has_no_room_here_is_planned_without_hours(
    description: Description, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(request: Request) -> None:
        raise MemoryError("the process that loaded the model was killed")

    monkeypatch.setattr(trials, "calibrate", killed)
    plan = make_plan(parse_run(description))
    assert plan.device is None and all(step.hours is None and step.flops > 0 for step in plan.steps)
    assert sum("has no room here" in note for note in plan.notes) == 2


def test_a_stage_is_calibrated_on_documents_that_the_run_does_not_skip(
    description: Description, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unusable ones are passed over, as many as are looked through; where those are all, there are no hours."""
    tried: list[Request] = []

    def calibrate(request: Request) -> None:
        tried.append(request)
        raise MemoryError("none was loaded")

    monkeypatch.setattr(trials, "calibrate", calibrate)
    one_stage = json.loads(json.dumps(description | {"stages": description["stages"][:1]}))
    one_stage["score"] = [{"stage": "pretrain"}]
    nulls = [{"id": f"null-{n}", "text": None} for n in range(6)]
    one_stage["stages"][0]["documents"]["path"] = runs.write_lines(tmp_path / "base.jsonl", [*nulls, *runs.BASE])
    make_plan(parse_run(one_stage))
    asked = {trial.name: [document.id for document in trial.documents] for trial in tried[0].trials}
    first = [row["id"] for row in runs.BASE[:4]]
    assert asked["covariance"] == asked["scoring.0"] == first
    monkeypatch.setattr(trials, "LOOKED_THROUGH", 6)
    plan = make_plan(parse_run(one_stage))
    assert len(tried) == 1 and all(step.hours is None and step.flops > 0 for step in plan.steps)
    assert any("pretrain: of the documents for its covariance none of the first 6 is usable" in n for n in plan.notes)
