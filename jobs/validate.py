"""Check what the scores claim: `python jobs/validate.py solvers --help`. Results: docs/validation.md.

Needs the extras `demo` and `validate`: pip install -c constraints.txt torch==2.13.0 -e ".[demo,validate]"
"""

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from msif_ray.errors import UserError
from msif_ray.heap import keep_freed_memory

app = typer.Typer(help="Check what the scores claim.", add_completion=False, no_args_is_help=True)


@app.callback()
def chosen() -> None:
    """Each experiment writes Parquet, JSON and a figure, and goes on where it was when run again."""


@app.command()
def solvers(
    folder: Annotated[Path, typer.Option(help="Where results and what is done go.")] = Path("runs/validate/solvers"),
    seed: Annotated[int, typer.Option()] = 0,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    hidden: Annotated[int, typer.Option(min=4, help="Of the 2-layer model.")] = 256,
    vocabulary: Annotated[int, typer.Option(min=300)] = 1024,
    epochs: Annotated[int, typer.Option(min=1)] = 3,
    documents: Annotated[int, typer.Option(min=4, help="That make the Gauss-Newton operator.")] = 128,
    scored: Annotated[int, typer.Option(min=4)] = 256,
    queries: Annotated[int, typer.Option(min=1)] = 8,
    few_queries: Annotated[int, typer.Option(min=1, help="For what takes many solves.")] = 2,
    iterations: Annotated[int, typer.Option(min=1, help="Of conjugate gradients, at most.")] = 200,
    few_iterations: Annotated[int, typer.Option(min=1, help="At each other damping, at most.")] = 96,
    block_iterations: Annotated[int, typer.Option(min=1, help="For each map's own block, at most.")] = 24,
    tolerance: Annotated[float, typer.Option(help="The relative residual of the truth.")] = 1e-4,
    lissa: Annotated[int, typer.Option(min=1, help="Steps.")] = 200,
    arnoldi: Annotated[int, typer.Option(min=4, help="Steps.")] = 60,
    draws: Annotated[int, typer.Option(min=2, help="Labels per position, where there are many.")] = 16,
    damping: Annotated[list[float], typer.Option(help="Times the mean eigenvalue; several.")] = [0.1, 1.0, 0.01, 0.001],  # noqa: B006
) -> None:
    """Scores of EK-FAC and of other methods against conjugate gradients run to convergence."""
    try:
        from msif_ray.validate.report import machine, write_solvers
        from msif_ray.validate.setting import Sizes
        from msif_ray.validate.solvers import Budget, Experiment
    except ModuleNotFoundError as error:
        raise UserError(f'the validation needs {error.name}: pip install -e ".[demo,validate]"') from None
    torch.set_num_threads(threads)
    console = Console(stderr=True, highlight=False)
    sizes = Sizes(hidden, vocabulary, epochs, documents, scored, queries)
    budget = Budget(
        tuple(damping), tolerance, iterations, few_queries, few_iterations, block_iterations, lissa, arnoldi, draws
    )
    found = Experiment(sizes, budget, seed, folder, console.print).run()
    write_solvers(folder, found | {"machine": machine(threads)})
    console.print(f"results: {folder}")


@app.command()
def retraining(
    folder: Annotated[Path, typer.Option(help="Where results and what is done go.")] = Path("runs/validate/retraining"),
    seed: Annotated[int, typer.Option()] = 0,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    countries: Annotated[int, typer.Option(min=2, help="With four facts each.")] = 44,
    asked: Annotated[int, typer.Option(min=1, help="Of these, by fine-tuning; queries ask the rest.")] = 11,
    wordings: Annotated[int, typer.Option(min=1, max=5, help="Documents that state a fact.")] = 3,
    hidden: Annotated[int, typer.Option(min=4, help="Of the 2-layer model.")] = 64,
    epochs: Annotated[int, typer.Option(min=1, help="Of pre-training.")] = 24,
    alpha: Annotated[float, typer.Option(help="Of the real proximal term, an eigenvalue.")] = 0.3,
    settle_steps: Annotated[int, typer.Option(min=1, help="To its minimum.")] = 60,
    halves: Annotated[int, typer.Option(min=2, help="Random halves; more may be asked for later.")] = 120,
    at_once: Annotated[int, typer.Option(min=1, help="Models trained side by side; keep it.")] = 4,
    removal_groups: Annotated[int, typer.Option(min=0, help="Of queries whose documents are removed; or more.")] = 4,
    group: Annotated[int, typer.Option(min=1, help="Queries of each.")] = 6,
    removed: Annotated[int, typer.Option(min=1, help="Documents of each query.")] = 5,
    solved_queries: Annotated[int, typer.Option(min=0, help="Solved by conjugate gradients.")] = 16,
    iterations: Annotated[int, typer.Option(min=1, help="Of these, at most.")] = 64,
) -> None:
    """Scores of every method against retraining: linear datamodeling scores, and documents removed."""
    try:
        from msif_ray.validate.pipeline import Sizes
        from msif_ray.validate.removal import Removals
        from msif_ray.validate.report import machine
        from msif_ray.validate.retrained import Trainings
        from msif_ray.validate.retraining import Budget, Retraining
        from msif_ray.validate.retraining_report import recommendation, write_retraining
    except ModuleNotFoundError as error:
        raise UserError(f'the validation needs {error.name}: pip install -e ".[demo,validate]"') from None
    torch.set_num_threads(threads)
    keep_freed_memory()
    console = Console(stderr=True, highlight=False)
    sizes = Sizes(countries, asked, wordings, hidden, epochs=epochs, alpha=alpha, settle_steps=settle_steps)
    budget = Budget(
        halves, Removals(removal_groups, group, removed), solved_queries=solved_queries, iterations=iterations
    )
    trainings = Trainings(sizes, seed, folder, at_once, console.print)
    found = Retraining(trainings, budget, console.print).run()
    write_retraining(folder, found | {"machine": machine(threads)})
    for row in found["recommended"]:
        console.print(recommendation(row))
    console.print(f"results: {folder}")


if __name__ == "__main__":
    try:
        app()
    except UserError as error:
        sys.exit(f"validate: {error}")
