"""Peaks of memory of carrying many queries back and of scoring with them: `python peaks.py folder` prints JSON."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import models
import torch
from cluster import runs

from msif_ray import layout
from msif_ray.cluster import carry, directions, partials, passage
from msif_ray.cluster.outcomes import Outcome
from msif_ray.cluster.partials import Coverage
from msif_ray.cluster.score_jobs import ScoreJob
from msif_ray.config import parse_run
from msif_ray.influence.batch import Batch, WindowKey
from msif_ray.influence.capture import Capture, Captured
from msif_ray.influence.directions import DenseDirections, LowRankDirections
from msif_ray.influence.modules import find_linear_maps
from msif_ray.plan.memory import Gauge
from msif_ray.store import save_tensors, write_json

CPU = torch.device("cpu")
MEBI = 2**20
# What a step takes beside its budget: files' headers, buffers of the libraries, fragments of freed memory, and for
# scoring the batch and products of at most 2**22 entries.
CARRY_CONSTANT, SCORE_CONSTANT = 24 * MEBI, 64 * MEBI

Peak = tuple[int, int, int]
"""Bytes allowed, found, and of everything at once."""


def rise(work: Callable[[], object]) -> int:
    """How far the peak of memory rises above what is there before."""
    gauge = Gauge(CPU)
    gauge.reset()
    before = gauge.now()
    work()
    return gauge.peak() - before


def carrying(folder: Path) -> Peak:
    """96 queries at a map of 384 x 385, carried three at a time into shards of 16."""
    out, columns, count, shard, memory = 384, 385, 96, 16, 16 * MEBI
    names = tuple(f"query-{n}" for n in range(count))
    for start in range(0, count, 8):
        block = f"00000-{start // 8:07d}"
        partial = partials.new_folder(folder / "partials", block)
        part = {}
        for name in names[start : start + 8]:
            part[f"activations/{name}"], part[f"gradients/{name}"] = torch.randn(5, columns), torch.randn(5, out)
        save_tensors(layout.part_file(partial, "m", 0), part)
        partials.publish(partial, [["m"]], [(block, Outcome({}, (), 0).counts)], None)
    for stage in ("pretrain", "tune"):
        basis = {
            side: torch.linalg.qr(torch.randn(n, n))[0]
            for side, n in (("activation_basis", columns), ("gradient_basis", out))
        }
        save_tensors(layout.basis_file(folder / stage, "m"), basis)
        save_tensors(layout.eigenvalues_file(folder / stage, "m"), {"eigenvalues": torch.rand(out, columns)})
    description = runs.two_stages(folder, "run", dtype="float32")
    description["queries"]["energy"] = 0.9
    cut = tuple((start, start + shard) for start in range(0, count, shard))
    factors = {0: folder / "pretrain", 1: folder / "tune"}
    task = passage.CarryTask(parse_run(description), 0, factors, names, folder / "directions", cut, memory)
    found = partials.read_disjoint(folder / "partials")
    gradients = Coverage(tuple(found), frozenset(block for partial in found for block in partial.blocks))
    # As the formula has it for this memory in place of the default.
    each = out * columns * 4
    carry.CARRY_BYTES = memory
    allowed = carry.task_bytes((out, columns), task, 4) + CARRY_CONSTANT
    means = {index: {"m": 0.5} for index in factors}
    found_peak = rise(lambda: carry.write_directions("m", task, passage.Gradients(gradients, 2), means))
    return allowed, found_peak, carry.CARRY_COPIES * count * each


def batch() -> Captured:
    model = models.build_model("gpt2", 1, hidden=256, intermediate=1024).float()
    ids = torch.arange(8 * 32).reshape(8, 32) % len(models.VOCABULARY)
    targets = torch.ones(8, 32, dtype=torch.bool)
    targets[:, 0] = False
    keys = tuple(WindowKey(str(row), 0) for row in range(8))
    with Capture(model, find_linear_maps(model)) as capture:
        return capture.run(Batch(ids, torch.ones_like(targets), targets, keys))


def scoring(folder: Path, rank: int | None, count: int, memory: int) -> Peak:
    """Directions on disk, of that rank or dense (None), scored within `memory`."""
    captured = batch()
    cut = [(start, start + 4) for start in range(0, count, 4)]
    maps, total = {}, 0
    for name, described in captured.maps.items():
        out, columns = described.shape
        for shard in cut:
            form = (
                DenseDirections(torch.randn(4, out, columns))
                if rank is None
                else LowRankDirections.stacked(torch.randn(4, rank, out), torch.randn(4, rank, columns))
            )
            kept = torch.ones(4, dtype=torch.float64)
            path = layout.direction_file(folder, name, shard)
            directions.save_shard(path, form, torch.full((4,), rank or out), kept, {})
        vectors = None if rank is None else 4 * rank
        maps[name] = {"shape": [out, columns], "vectors": [vectors] * len(cut)}
        total += len(cut) * 4 * directions.entries(4, (out, columns), vectors)
    write_json(layout.directions_manifest(folder), {"shards": cut, "itemsize": 4, "maps": maps})

    def work() -> None:
        started = ScoreJob((folder,), memory).start(list(captured.maps), CPU)
        for _ in range(3):
            started.add(captured)

    return memory + SCORE_CONSTANT, rise(work), total


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    batch()  # what the libraries take for themselves is there before
    found = {
        "carrying": carrying(root / "carrying"),
        "scoring, dense": scoring(root / "dense", None, 80, 64 * MEBI),
        "scoring, low rank": scoring(root / "low", 64, 160, 40 * MEBI),
    }
    print(json.dumps(found))
