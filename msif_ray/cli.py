"""The command line: one command per step, all of them the same code as `msif run`."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from msif_ray.config import load_run
from msif_ray.errors import UserError

app = typer.Typer(
    help="Which pre-training documents made a fine-tuned language model say that?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Description = Annotated[Path, typer.Argument(help="The run description, a YAML file.", show_default=False)]


@app.command("run")
def run_command(description: Description) -> None:
    """Run everything that is left: fit, carry queries back, score, and list the top documents."""
    from msif_ray.run import run

    run(load_run(description))


@app.command("fit")
def fit_command(description: Description) -> None:
    """Fit the stages' EK-FAC factors."""
    from msif_ray.run import run

    run(load_run(description), until="fit")


@app.command("score")
def score_command(description: Description) -> None:
    """Score the documents, fitting factors first where they are missing."""
    from msif_ray.run import run

    run(load_run(description), until="score")


@app.command("demo")
def demo_command(
    folder: Annotated[Path, typer.Option(help="Where the demo's runs go.")] = Path("runs/demo"),
) -> None:
    """Attribute a small model's answers to the World Factbook documents that it was trained on."""
    from msif_ray.demo.run import run_demo

    run_demo(folder)


def main() -> None:
    """The `msif` command: a user's mistake is one line on standard error and exit status 2."""
    try:
        app()
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print(f"msif: {error}", style="red", markup=False, highlight=False)
        sys.exit(2)
