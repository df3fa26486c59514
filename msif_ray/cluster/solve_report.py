"""What came of the stages that conjugate gradients solved: residuals against time, and a summary."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa

from msif_ray import layout
from msif_ray.cluster.solve import Record, SolvedStage, Solver
from msif_ray.store import delete_folder
from msif_ray.tables import write_table

SCHEMA = pa.schema(
    [
        ("stage", pa.string()),
        ("query_id", pa.string()),
        ("iteration", pa.int32()),
        ("relative_residual", pa.float64()),
        ("seconds", pa.float64()),
        ("refined", pa.bool_()),
    ],
    metadata={
        "relative_residual": "norm of the residual over that of the right-hand side; of iteration 0, EK-FAC's answer",
        "seconds": "until then, of all queries that were solved together",
        "refined": "whether the last iteration is the query's answer; else EK-FAC's is",
    },
)


def report_solves(solver: Solver, solved: Sequence[SolvedStage]) -> dict[str, Any]:
    """Writes `residuals.parquet` of an entry: each query's relative residual after each iteration of each stage, 0
    being EK-FAC's answer, which none of them goes on from; the seconds until then of all that were solved together, and
    whether the last one is the query's answer (`refined`). Says and gives a summary of each stage, by its name."""
    rows: list[dict[str, Any]] = []
    summaries = {}
    queries = solver.task.queries
    for stage in solved:
        records = solver.records(stage)
        name, first = stage.setup.stage, 0
        kept: list[str] = []
        for record in records:
            refined = _refined(record, stage)
            own = queries[first : first + len(refined)]
            rows += _rows(name, own, record, refined)
            kept += [query for query, is_refined in zip(own, refined, strict=True) if not is_refined]
            first += len(refined)
        summaries[name] = _summary(records, stage, kept)
        solver.say(_line(name, summaries[name], len(queries)))
    if solved:
        write_table(layout.residuals_file(solver.task.folder), pa.Table.from_pylist(rows, SCHEMA))
    return summaries


def drop_solves(folder: Path) -> None:
    """Deletes what the solves of a finished folder of directions kept."""
    delete_folder(layout.solves(folder))


def _refined(record: Record, stage: SolvedStage) -> list[bool]:
    return record.numbers.refined(stage.solver.tolerance).tolist()


def _rows(stage: str, queries: Sequence[str], record: Record, refined: Sequence[bool]) -> list[dict[str, Any]]:
    rows, seconds = [], 0.0
    relative = (record.numbers.relative_of_ekfac.tolist(), *record.relative[1:])
    for iteration, (residuals, took) in enumerate(zip(relative, (0.0, *record.seconds), strict=True)):
        seconds += took
        for query, residual, is_refined in zip(queries, residuals, refined, strict=True):
            rows.append(
                {
                    "stage": stage,
                    "query_id": query,
                    "iteration": iteration,
                    "relative_residual": residual,
                    "seconds": seconds,
                    "refined": is_refined,
                }
            )
    return rows


def _summary(records: Sequence[Record], stage: SolvedStage, kept: list[str]) -> dict[str, Any]:
    """`kept_ekfac` are the queries that were not solved, and keep EK-FAC's answer; `solved_together` how many were, as
    the memory of a rank allowed: within the tolerance, answers depend on it."""
    before = [r for record in records for r in record.numbers.relative_of_ekfac.tolist()]
    after = [r for record in records for r in record.relative[-1]]
    return {
        "iterations": max(record.iterations for record in records),
        "documents": records[0].documents,
        "solved_together": [len(record.numbers.right) for record in records],
        "tolerance": stage.solver.tolerance,
        "relative_residual": {
            "ekfac": {"median": median(before), "max": max(before)},
            "cg": {"median": median(after), "max": max(after)},
        },
        "seconds": sum(sum(record.seconds) for record in records),
        "kept_ekfac": kept,
    }


def _line(stage: str, about: dict[str, Any], queries: int) -> str:
    before, after = (about["relative_residual"][which]["median"] for which in ("ekfac", "cg"))
    line = (
        f"queries: {stage}: {about['iterations']} iterations took the relative residual from {before:.3g} to "
        f"{after:.3g} (medians), {about['seconds']:.0f} s"
    )
    if about["kept_ekfac"]:
        line += (
            f"; {len(about['kept_ekfac'])} of {queries} queries are over {about['tolerance']:g} and keep EK-FAC's "
            "answer: more iterations, or more damping, would solve them"
        )
    return line
