"""Time every step of a run beside a training pass: `python jobs/benchmark.py --help`.

Needs PyTorch, transformers and small packages (docs/performance.md), but for `--ray` and `--against`.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from msif_ray.benchmark.report import Options, check_device, check_writable, kept_memory, machine, measure, show, write
from msif_ray.benchmark.workload import SHAPES, Workload
from msif_ray.errors import UserError
from msif_ray.heap import keep_freed_memory


def main(
    size: Annotated[str, typer.Option(help=f"The model: {', '.join(SHAPES)}.")] = "small",
    documents: Annotated[int, typer.Option(min=1)] = 256,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per document; of the longest if --ragged.")] = 128,
    ragged: Annotated[bool, typer.Option(help="Lengths distributed as the World Factbook's documents.")] = False,
    queries: Annotated[list[int], typer.Option(min=1, help="How many queries; may be given several times.")] = [8, 64],  # noqa: B006
    rank: Annotated[int | None, typer.Option(min=1, help="Of the queries' directions; exact without.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16", "float64"], typer.Option()] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    threads: Annotated[int, typer.Option(min=1)] = 2,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    eigh_maps: Annotated[
        int | None, typer.Option(min=0, help="Decompose so many maps and scale the time to all.")
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(min=0, help="GiB for what a first pass captured; 0: none. Default: as a run's rank."),
    ] = None,
    against: Annotated[Literal["kronfluence"] | None, typer.Option(help="Run it on the same inputs, too.")] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Time fit and scores through Ray, too.")] = False,
    ray_documents: Annotated[
        int, typer.Option(min=1, help="Of the job through Ray, which is to take minutes: it pays its start once.")
    ] = 2560,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the figures.")] = None,
) -> None:
    """Time every step of a run beside a training pass of the same model over the same tokens."""
    if size not in SHAPES:
        raise UserError(f"--size: there is no {size!r}, only {', '.join(SHAPES)}")
    check_device(device)
    if json_file is not None:
        check_writable(json_file)
    torch.set_num_threads(threads)
    keep_freed_memory()  # as a rank does
    workload = Workload(SHAPES[size], documents, tokens, ragged, getattr(torch, dtype), device)
    if against is not None:
        from msif_ray.benchmark.peers import check_comparable, compare

        check_comparable(workload)
    if ray:
        from msif_ray.benchmark.through_ray import check_installed
        from msif_ray.benchmark.through_ray import compare as through_ray

        check_installed()
    options = Options(tuple(queries), rank, repeats, kept_memory(keep, device, threads), eigh_maps)
    found = machine(device) | {"size": size, "documents": documents, "longest": tokens, "dtype": dtype, "rank": rank}
    found |= measure(workload, options) | {"ray_overhead": None}
    _keep(found, json_file)
    if against is not None:
        found[against] = compare(workload, queries[0], options.keep)
        _keep(found, json_file)
    if ray:
        job = replace(workload, documents=ray_documents)
        found |= {"ray_documents": ray_documents} | through_ray(job, queries[0], threads, options.keep)
        _keep(found, json_file)
    show(found, Console(width=100))


def _keep(found: Mapping[str, Any], path: Path | None) -> None:
    """Writes what has been measured so far: a comparison that fails later takes nothing of it away."""
    if path is not None:
        write(found, path)


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        sys.exit(f"benchmark: {error}")
