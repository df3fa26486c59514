"""The benchmark's steps do the work that they are timed for, and its figures are what the job promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from msif_ray.benchmark.report import Options, check_writable, machine, measure, write
from msif_ray.benchmark.steps import Steps
from msif_ray.benchmark.workload import Shape, Workload
from msif_ray.errors import UserError
from msif_ray.influence.directions import DenseDirections

ROOT = Path(__file__).parents[2]
TINY = Shape(layers=2, hidden=16, heads=2, vocabulary=40, tokens_per_batch=48)
PROMISED = {
    "train_s", "covariance", "eigh_s", "correction", "score_q2", "score_q2_curvature", "score_q5", "fit_total",
    "score_q2_low_rank", "score_q2_low_rank_without_norms", "peak_rss_mib",
}  # fmt: skip


def test_lengths_are_those_of_the_factbook_and_batches_hold_every_document_once() -> None:
    workload = Workload(TINY, documents=60, tokens=44, ragged=True)
    lengths = workload.lengths()
    assert max(lengths) <= 44 and min(lengths) >= 2 and sorted(lengths)[30] == pytest.approx(6, abs=1)
    batches = workload.batches()
    assert sorted(int(n) for batch in batches for n in batch.attention_mask.sum(1)) == sorted(lengths)
    assert len({key for batch in batches for key in batch.keys}) == 60
    assert all(batch.attention_mask.numel() <= TINY.tokens_per_batch for batch in batches)


def test_scores_are_inner_products_with_the_gradients_that_autograd_gives() -> None:
    workload = Workload(TINY, documents=7, tokens=12, ragged=True, dtype=torch.float64)
    steps = Steps(workload)
    directions = {
        name: DenseDirections(torch.randn(3, *described.shape, dtype=torch.float64))
        for name, described in steps.maps.items()
    }
    found = steps.score(directions)
    torch.testing.assert_close(steps.score(directions, norms=False), found)
    wanted = []
    for batch in steps.batches:
        for row in range(len(batch.keys)):
            ids = batch.input_ids[row][batch.attention_mask[row]][None]
            logits = steps.model(input_ids=ids, use_cache=False).logits[0, :-1]
            functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
            score = torch.zeros(3, dtype=torch.float64)
            for name, each in directions.items():
                module = steps.model.get_submodule(name)
                gradient = torch.cat([module.weight.grad, module.bias.grad[:, None]], 1)
                score += (each.matrix * gradient).sum((1, 2))
            wanted.append(score)
            steps.model.zero_grad(set_to_none=True)
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("rank", "eigh_maps"), [(None, None), (2, 4), (2, 0)])
def test_every_promised_figure_is_there(rank: int | None, eigh_maps: int | None) -> None:
    workload = Workload(TINY, documents=6, tokens=10)
    found = measure(workload, Options(queries=(2, 5), rank=rank, repeats=1, eigh_maps=eigh_maps))
    assert found.keys() >= PROMISED
    wanted = PROMISED - ({"eigh_s", "fit_total"} if eigh_maps == 0 else set())
    assert all(found[key] > 0 for key in wanted)
    assert found["tokens"] == 60


@pytest.mark.parametrize("ragged", [False, True])
def test_a_training_pass_has_the_operations_that_pytorch_counts(ragged: bool) -> None:
    """Of documents alone and so long that attention weighs: rows of a batch are padded, which is no work of theirs."""
    shape = Shape(layers=2, hidden=32, heads=2, vocabulary=40, tokens_per_batch=1)
    workload = Workload(shape, documents=5, tokens=256, ragged=ragged)
    # Attention by plain products: the fused one of CPUs is not counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        Steps(workload).train()
    found = measure(workload, Options(queries=(1,), rank=1, repeats=1, eigh_maps=0))
    assert found["train_tflops"] * 1e12 * found["train_s"] == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_machine_is_called_by_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is there did not do what was timed on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert machine("cuda")["device"] == "a GPU" and machine("cpu")["device"] != "a GPU"


def test_a_file_is_there_with_its_figures_and_not_before(tmp_path: Path) -> None:
    path, there = tmp_path / "new" / "found.json", tmp_path / "there.json"
    check_writable(path)
    assert path.parent.is_dir() and not path.exists()
    write({"train_s": 1.0}, path)
    assert json.loads(path.read_text()) == {"train_s": 1.0}
    there.write_text("{}")
    check_writable(there)
    assert there.read_text() == "{}"
    with pytest.raises(UserError, match=f"^--json: {tmp_path} cannot be written: Is a directory"):
        write({}, tmp_path)


def test_the_job_writes_json_and_needs_neither_ray_nor_deepspeed(tmp_path: Path) -> None:
    blocked = "import sys; sys.modules.update(dict.fromkeys(['ray', 'deepspeed', 'datasets', 'psutil'])); "
    blocked += "import runpy; runpy.run_path('jobs/benchmark.py', run_name='__main__')"
    options = ["--documents", "2", "--tokens", "16", "--repeats", "1", "--queries", "1", "--rank", "2"]
    written = tmp_path / "new" / "found.json"
    command = [sys.executable, "-c", blocked, *options, "--eigh-maps", "0", "--json", str(written)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "training pass" in done.stdout
    found = json.loads(written.read_text())
    assert found["size"] == "small" and found["ray_overhead"] is None  # not timed
