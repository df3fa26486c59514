"""What tasks, the record and the products' job of a solve make together, without Ray: the same as in one process."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import pytest
import reference
import reference_solve
import torch
from influence import pipeline

from msif_ray import layout
from msif_ray.cluster import solve_tasks
from msif_ray.cluster.iterates import ANSWER, EKFAC, ProductJob, load_answer, load_iterate, save_answer, save_iterate
from msif_ray.cluster.solve import Record
from msif_ray.config import CgSolver
from msif_ray.corpus.windows import to_batch
from msif_ray.errors import UserError
from msif_ray.influence.capture import Capture
from msif_ray.influence.conjugate import (
    Iterate,
    Numbers,
    State,
    System,
    inner_by_query,
    solve,
    sum_left,
    sum_met,
    sum_over_maps,
)
from msif_ray.influence.gauss_newton import ProductSums
from msif_ray.influence.modules import find_linear_maps
from msif_ray.store import read_json, write_json

DOCUMENTS = models.random_documents(1, 6, (3, 10), prefix="base")
QUERIES = models.random_documents(3, 3, (3, 6), completions=True, prefix="query")
ITERATIONS, TOLERANCE = 6, 0.05


@dataclass(frozen=True)
class Products:
    """In place of the partial sums on storage."""

    sums: dict[str, torch.Tensor]
    documents: int

    def total(self, map_name: str) -> dict[str, torch.Tensor]:
        return {"P": self.sums[map_name]}


@pytest.fixture(scope="module")
def stage() -> reference.StageSpec:
    model = models.build_model("gpt_neox", seed=4, hidden=8, intermediate=12, layers=1)
    return reference.StageSpec("base", model, models.build_tokenizer(), DOCUMENTS)


def test_a_solve_on_storage_is_that_in_one_process(
    stage: reference.StageSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = find_linear_maps(stage.model)
    factors = pipeline.fit(stage).factors
    damping = {name: float(factor.mean_eigenvalue) for name, factor in factors.items()}
    in_memory = {name: System(factor, damping[name]) for name, factor in factors.items()}
    right = reference_solve.query_gradients(stage, list(maps), QUERIES)
    encoded, _ = pipeline.encode_rows(stage, DOCUMENTS)
    batches = [to_batch(windows) for windows in pipeline.batches(stage, encoded, 60)]

    def add(sums: ProductSums) -> dict[str, torch.Tensor]:
        with Capture(stage.model, maps) as capture:
            for batch in batches:
                sums.add(capture, batch)
        return sums.sums

    def product(directions: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: total / len(encoded) for name, total in add(ProductSums(directions)).items()}

    wanted = solve(in_memory, State.begun(in_memory, right), product, ITERATIONS, TOLERANCE)

    monkeypatch.setattr(solve_tasks.Systems, "system", lambda _, name: in_memory[name])
    systems = solve_tasks.Systems(tmp_path, tmp_path, damping)
    for name, system in in_memory.items():
        save_answer(tmp_path, EKFAC, name, system.precondition(right[name]))
        save_iterate(tmp_path, 0, name, Iterate.first(system, right[name]))
    Record.begun(Numbers.begun(sum_over_maps(inner_by_query(v, v) for v in right.values()))).write(tmp_path)
    solver = CgSolver(kind="cg", iterations=ITERATIONS, tolerance=TOLERANCE)
    alone = 0
    while (step := (record := reread(tmp_path)).next_step(solver)) is not None:
        number = record.iterations + 1
        work = ProductJob(tmp_path, number - 1, step).start(list(maps), torch.device("cpu"))
        alone += work.sums.queries
        products: Any = Products(add(work.sums), len(encoded))
        met = sum_met(solve_tasks.met_by(name, systems, products, number, step) for name in maps)
        alpha = record.numbers.alpha(step, met)
        left = sum_left(solve_tasks.write_next(name, systems, products, number, step, alpha) for name in maps)
        record.with_next(record.numbers.advanced(met, left), 0.5, len(encoded)).write(tmp_path)

    assert record.iterations == wanted.iterations and record.documents == len(encoded)
    assert torch.allclose(torch.tensor(record.relative).double(), torch.stack(wanted.residuals), rtol=1e-6)
    assert alone == sum(int((residuals > TOLERANCE).sum()) for residuals in wanted.residuals[: wanted.iterations])
    assert record.numbers.relative_of_ekfac.min() > 0
    for later in (False, True):
        refined = torch.tensor([True, False, True])
        for name, system in in_memory.items():
            solve_tasks.write_answer(name, systems, record.iterations, refined, later)
            found = load_answer(tmp_path, ANSWER, name)
            exact, ekfac = wanted.solution[name], system.precondition(right[name])
            scale = damping[name] if later else 1.0
            assert torch.allclose(found[[0, 2]], scale * exact[[0, 2]], rtol=1e-6, atol=1e-9)
            assert torch.allclose(found[1], scale * ekfac[1])
    assert load_iterate(tmp_path, record.iterations, next(iter(maps))).direction is not None


def reread(folder: Path) -> Record:
    found = Record.read(folder)
    assert found is not None
    return found


def test_a_record_of_another_version_does_not_count(tmp_path: Path) -> None:
    record = Record.begun(Numbers.begun(torch.ones(2, dtype=torch.float64)))
    record.write(tmp_path)
    assert reread(tmp_path).relative == ((1.0, 1.0),)
    path = layout.solve_record(tmp_path)
    about = read_json(path)
    numbers = about["numbers"]
    write_json(path, about | {"numbers": numbers | {"met": numbers.pop("first")}})
    assert Record.read(tmp_path) is None


@pytest.mark.parametrize("wrong", ["map", "vectors", "solve"])
def test_vectors_in_the_place_of_others_are_named(tmp_path: Path, wrong: str) -> None:
    """Of the same queries and a map of the same shape."""
    own, other = tmp_path / "tune" / "000000-000002", tmp_path / "pretrain" / "000000-000002"
    save_answer(own, ANSWER, "a", torch.zeros(2, 3, 4))
    assert load_answer(own, ANSWER, "a").shape == (2, 3, 4)
    of = {"map": (own, ANSWER, "b"), "vectors": (own, EKFAC, "a"), "solve": (other, ANSWER, "a")}[wrong]
    save_answer(*of, torch.ones(2, 3, 4))
    path = layout.solve_vectors(own, ANSWER, "a")
    path.write_bytes(layout.solve_vectors(*of).read_bytes())
    with pytest.raises(UserError, match=f"^{path} is in the wrong place: its {wrong} is .*; delete the folder {own}"):
        load_answer(own, ANSWER, "a")
