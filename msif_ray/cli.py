"""The command line: one command per step, all of them the same code as `msif run`."""

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from msif_ray.errors import UserError
from msif_ray.streams import open_streams

if TYPE_CHECKING:
    from msif_ray.config import Run

app = typer.Typer(
    help="Which pre-training documents made a fine-tuned language model say that?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Not a path, which would make one slash of two in an address.
Description = Annotated[str, typer.Argument(help="The run description, a YAML file.", show_default=False)]

FinishedRun = Annotated[str, typer.Argument(help="The run_dir of a finished run.", show_default=False)]


def load_run(description: str) -> "Run":
    """The run of a description. What takes long to import is imported in commands alone: there Ctrl-C ends without a
    traceback."""
    from msif_ray import config

    return config.load_run(description)


@app.command("run")
def run_command(description: Description) -> None:
    """Run everything that is left: fit, carry queries back, score, list the top documents and write the report."""
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


@app.command("index")
def index_command(description: Description) -> None:
    """Build the indexes of compressed document gradients that the description names under `index`."""
    from msif_ray.run import run

    run(load_run(description), until="index")


@app.command("plan")
def plan_command(
    description: Description,
    measure: Annotated[bool, typer.Option(help="Time each stage's model on a few real batches.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object (bytes, FLOPs, hours).")] = False,
) -> None:
    """Say what the run will cost: documents, tokens, FLOPs, hours, memory and storage. Nothing is run."""
    from msif_ray.plan.make import make_plan
    from msif_ray.plan.report import print_plan

    plan = make_plan(load_run(description), measure)
    if as_json:
        print(json.dumps(plan.as_json(), indent=2, ensure_ascii=False))
    else:
        print_plan(plan, Console(highlight=False))


@app.command("report")
def report_command(
    run_dir: FinishedRun,
) -> None:
    """Write report.html anew: the top documents of every query, in one file to look at."""
    from msif_ray.results.report import write_report
    from msif_ray.results.signals import signal_lines

    path, signals = write_report(run_dir)
    for line in signal_lines(signals):
        Console(stderr=True, soft_wrap=True).print(Text(f"note: {line}"))
    print(path)


@app.command("show")
def show_command(
    run_dir: FinishedRun,
    query: Annotated[str | None, typer.Option(help="The id of one query; default: all of them.")] = None,
    scores: Annotated[str | None, typer.Option(help="The name of a `score` entry; default: the first.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Documents of each side.")] = 5,
) -> None:
    """Print each query with the documents that support and oppose its completion most."""
    from msif_ray.results.show import show

    show(run_dir, Console(highlight=False), query, scores, top)


@app.command("compare")
def compare_command(
    run_a: FinishedRun,
    run_b: FinishedRun,
    query: Annotated[str | None, typer.Option(help="The id of one query; default: all that both have.")] = None,
    scores_a: Annotated[str | None, typer.Option(help="A `score` entry of the first; default: its first.")] = None,
    scores_b: Annotated[str | None, typer.Option(help="A `score` entry of the second; default: its first.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Documents that make up the top; –: there are no more.")] = 20,
) -> None:
    """Say how alike two runs' rankings are (two α, two models), and which documents moved most.

    The same run twice compares two of its `score` entries.
    """
    from msif_ray.results.compare import compare

    compare(run_a, run_b, Console(highlight=False), (scores_a, scores_b), query, top)


@app.command("aggregate")
def aggregate_command(
    run_dir: FinishedRun,
    by: Annotated[str, typer.Option(help="A column of the scored corpus.", show_default=False)],
    query: Annotated[str | None, typer.Option(help="Print the groups of one query; default: means over all.")] = None,
    scores: Annotated[str | None, typer.Option(help="The name of a `score` entry; default: the first.")] = None,
    out: Annotated[str | None, typer.Option(help="A Parquet file for the groups of every query.")] = None,
) -> None:
    """Sum influence by a column of the corpus, such as a domain, a date or a licence."""
    from msif_ray.results.aggregate import aggregate, of_query, print_aggregate
    from msif_ray.tables import write_table

    table = aggregate(run_dir, by, scores)
    shown = table if query is None else of_query(table, query)
    if out is not None:
        write_table(out, table)
    print_aggregate(shown, by, Console(highlight=False))


@app.command("demo")
def demo_command(
    folder: Annotated[str, typer.Option(help="Where the demo's runs go.")] = "runs/demo",
) -> None:
    """Attribute a small model's answers to the World Factbook documents that it was trained on."""
    from msif_ray.demo.run import run_demo

    run_demo(folder)


def main() -> None:
    """The `msif` command: a user's mistake is one line on standard error and exit status 2."""
    open_streams()
    try:
        app()
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print(Text(f"msif: {error}", style="red"))
        sys.exit(2)
