"""A stage's inverse curvature on a rank: the plain numbers whatever its memory, and files that are damaged by name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster import runs
from cluster.test_directions import CLOSE, CPU, World
from influence import pipeline

from msif_ray import layout
from msif_ray.cluster.curvature import Curvature, _Metrics, stage_curvature
from msif_ray.cluster.directions import STREAM_COPIES
from msif_ray.cluster.score_jobs import ScoreJob, Shares, left_beside
from msif_ray.config import parse_run
from msif_ray.errors import UserError
from msif_ray.influence.curvature import CurvatureMetric, curvature_squares
from msif_ray.influence.response import DampedInverse, Response
from msif_ray.paths import path_of
from msif_ray.store import load_tensors, save_tensors, write_json


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    yield World(tmp_path_factory.mktemp("world"))


def responses(world: World) -> dict[str, Response]:
    return {name: DampedInverse(1e-3 * factor.mean_eigenvalue) for name, factor in world.factors[0].items()}


def curvature(world: World, folder: Path | None = None, memory: int | None = None) -> Curvature:
    return Curvature(folder or world.folder / "pretrain", world.maps, responses(world), "float64", memory)


def squares(world: World, metrics: object) -> torch.Tensor:
    return torch.cat([curvature_squares(metrics, batch) for batch in world.captured])  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def expected(world: World) -> torch.Tensor:
    pairs = responses(world).items()
    factors = world.factors[0]
    plain = {n: CurvatureMetric(factors[n].basis, response(factors[n].eigenvalues)) for n, response in pairs}
    return squares(world, plain)


def held(metric: CurvatureMetric) -> int:
    tensors = (metric.basis.activations, metric.basis.gradients, metric.weights)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_memory_changes_no_norm_and_no_more_than_it_is_held(world: World, expected: torch.Tensor) -> None:
    sizes = [held(metric) for metric in curvature(world).load(CPU, 2**30).values()]
    total, streaming = sum(sizes), STREAM_COPIES * max(sizes)
    assert total > streaming + min(sizes)
    for memory in (2**30, total, total - 1, streaming + min(sizes), streaming, 1):
        for metrics in (curvature(world).load(CPU, memory), curvature(world, memory=memory).load(CPU, 2**30)):
            assert isinstance(metrics, _Metrics)
            for _ in range(2):
                torch.testing.assert_close(squares(world, metrics), expected, **CLOSE)
            resident = [held(metric) for metric in metrics.resident.values()]
            streamed = [held(metrics[name]) for name in metrics if name not in metrics.resident]
            assert (not streamed) == (memory >= total)
            assert sum(resident) + STREAM_COPIES * max(streamed, default=0) <= memory or not resident
            assert bool(resident) == (memory >= streaming + min(sizes))


def test_factors_are_read_in_the_type_that_the_model_s_sums_have(world: World, expected: torch.Tensor) -> None:
    narrow = Curvature(world.folder / "pretrain", world.maps, responses(world), "bfloat16").load(CPU, 2**30)
    assert {metric.weights.dtype for metric in narrow.values()} == {torch.float32}
    captured = pipeline.captures(pipeline.in_dtype(world.stages[0], torch.float32), runs.BASE[:14])
    found = torch.cat([curvature_squares(narrow, batch) for batch in captured])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0.0)


def test_factors_on_object_storage_are_fetched_once_to_be_streamed(
    world: World, expected: torch.Tensor, bucket: str, tmp_path: Path
) -> None:
    folder = path_of(f"s3://{bucket}/factors")
    for name in world.maps:
        for file in (layout.basis_file, layout.eigenvalues_file):
            save_tensors(file(folder, name), load_tensors(file(world.folder / "pretrain", name)))
    for memory in (2**30, 1, 1):
        torch.testing.assert_close(squares(world, curvature(world, folder).load(CPU, memory)), expected, **CLOSE)
        copies = [path for path in (tmp_path / "cache").glob("*") if path.is_dir()]
        assert len(copies) == (1 if memory == 1 else 0)


@pytest.mark.parametrize("memory", [2**30, 1])
@pytest.mark.parametrize("file", [layout.basis_file, layout.eigenvalues_file])
def test_a_damaged_or_missing_factor_is_named(world: World, tmp_path: Path, memory: int, file: object) -> None:
    for name in world.maps:
        for each in (layout.basis_file, layout.eigenvalues_file):
            save_tensors(each(tmp_path, name), load_tensors(each(world.folder / "pretrain", name)))
    path = file(tmp_path, list(world.maps)[1])  # type: ignore[operator]
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    for fault in ("damaged", "is not there"):
        with pytest.raises(UserError) as refused:
            squares(world, curvature(world, tmp_path).load(CPU, memory))
        message = str(refused.value)
        assert str(path) in message and fault in message and "delete it, and run" in message and "\n" not in message
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("shares", [None, Shares(tokens=True, stride=1)])
def test_a_scoring_job_adds_up_the_windows_norms_and_scores_as_without(
    world: World, expected: torch.Tensor, tmp_path: Path, shares: Shares | None
) -> None:
    folder = world.write(tmp_path, [(0, 11)], 2**30)
    jobs = [ScoreJob((folder, folder), shares=shares, curvature=each) for each in (curvature(world), None)]
    found, without = (job.start(list(world.maps), CPU) for job in jobs)
    for work in (found, without):
        for captured in (*world.captured, *world.captured):  # as if each document had two windows, both alike
            work.add(captured)
    taken = found.take()
    norms = {document.document_id: document.squared_curvature_norm for document in taken}
    keys = [key.document_id for captured in world.captured for key in captured.batch.keys]
    assert norms == pytest.approx(dict(zip(keys, (2 * expected).tolist(), strict=True)), rel=1e-12)
    for one, other in zip(taken, without.take(), strict=True):
        assert torch.equal(one.scores, other.scores) and one.squared_norm == other.squared_norm
        assert other.squared_curvature_norm == 0.0


def test_damping_is_the_scored_stage_s_at_every_map_and_an_unreached_expert_has_no_part(
    world: World, tmp_path: Path
) -> None:
    means = {"0.up": 2.0, "0.experts.1.up": 0.0, "0.experts.2.up": 4.0}
    maps = {name: {"shape": [3, 2], "mean_eigenvalue": mean} for name, mean in means.items()}
    write_json(layout.factors_manifest(tmp_path), {"maps": maps})
    shapes = dict.fromkeys(means, (3, 2))
    run = world.run()
    changed = run.model_copy(update={"cluster": run.cluster.model_copy(update={"factor_memory": 77})})
    found = stage_curvature(changed, changed.score[0], tmp_path, shapes)
    assert found.responses == {"0.up": DampedInverse(0.2), "0.experts.2.up": DampedInverse(0.4)}
    assert (found.factors, found.dtype, found.memory) == (tmp_path, "float64", 77)
    # A later stage's response is its part in scores of an earlier one; its own documents meet its damping.
    assert stage_curvature(run, run.score[1], tmp_path, shapes).responses["0.up"] == DampedInverse(0.02)
    flat = parse_run(
        run.model_dump() | {"stages": [s.model_dump() | {"damping": {"absolute": 0.5}} for s in run.stages]}
    )
    assert len(stage_curvature(flat, flat.score[0], tmp_path, shapes).responses) == 3


@pytest.mark.parametrize("own", [{"kind": "unrolled", "rate": 0.01, "steps": 30}, {"kind": "identity"}])
def test_the_response_is_the_entry_s_where_the_stage_s_own_is_no_damped_inverse(
    world: World, tmp_path: Path, own: dict[str, Any]
) -> None:
    description = world.run().model_dump(mode="json") | {"detail": {"curvature_norm": True}}
    description["stages"][1]["response"] = own
    with pytest.raises(UserError, match=rf"in score\.1 the response of 'tune' is {own['kind']}"):
        parse_run(description)
    description["score"][1]["responses"] = {"tune": {"kind": "proximal"}}
    run = parse_run(description)
    write_json(layout.factors_manifest(tmp_path), {"maps": {"0.up": {"shape": [3, 2], "mean_eigenvalue": 2.0}}})
    found = stage_curvature(run, run.score[1], tmp_path, {"0.up": (3, 2)})
    assert found.responses == {"0.up": DampedInverse(0.02)}


def test_factors_get_what_directions_leave_and_half_at_least() -> None:
    assert [left_beside(directions, 100) for directions in (0, 10, 50, 90, 1000)] == [100, 90, 50, 50, 50]
