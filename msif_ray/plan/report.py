"""A plan as tables, of at most 100 columns where numbers are of usual size, with the unit in every heading."""

from rich import box
from rich.console import Console
from rich.table import Table

from msif_ray.columns import print_table
from msif_ray.plan.make import Plan

GIB, TERA = 2**30, 1e12


def print_plan(plan: Plan, console: Console) -> None:
    """The tables, then what was measured and what estimated."""
    for table in (_corpora(plan), _steps(plan), _memory(plan), _storage(plan)):
        print_table(table, console)
    for line in _explanations(plan):
        console.print(f"• {line}", highlight=False, markup=False)


def number(value: float, estimated: bool = False) -> str:
    return ("≈ " if estimated else "") + f"{value:,.0f}"


def gibibytes(value: float) -> str:
    return significant(value / GIB)


def significant(value: float) -> str:
    """Three significant digits, none of them in exponents that a table could spare."""
    if value == 0 or abs(value) >= 99.95:
        return f"{value:,.0f}"
    if abs(value) < 0.001:
        return "< 0.001"
    return f"{value:.3g}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if position else "left", overflow="fold")
    return table


def _corpora(plan: Plan) -> Table:
    table = _table("Documents", "corpus", "documents", "tokens", "not usable", "counted on")
    for corpus in plan.corpora:
        guessed = corpus.sampled is not None
        table.add_row(
            corpus.name,
            number(corpus.documents),
            number(corpus.tokens, guessed),
            number(corpus.skipped, guessed),
            f"a sample of {number(corpus.sampled)}" if corpus.sampled is not None else "all",
        )
    return table


def _steps(plan: Plan) -> Table:
    table = _table("Steps", "step", "documents", "tokens", "passes", "TFLOP", "device-hours", "core-hours")
    for step in plan.steps:
        hours = "–" if step.hours is None else significant(step.hours)
        on_rank = step.runs_on == "rank"
        table.add_row(
            step.name,
            number(step.documents) if on_rank else "",
            number(step.tokens) if on_rank else "",
            number(step.passes) if on_rank else "",
            significant(step.flops / TERA),
            hours if on_rank else "",
            "" if on_rank else hours,
        )
    table.add_section()
    table.add_row(
        "all",
        "",
        "",
        number(sum(step.passes for step in plan.steps)),
        significant(sum(step.flops for step in plan.steps) / TERA),
        _total(plan, "rank"),
        _total(plan, "core"),
    )
    return table


def total_hours(plan: Plan, runs_on: str) -> float | None:
    """Hours of all steps that run there; None where one was not measured."""
    hours = [step.hours for step in plan.steps if step.runs_on == runs_on]
    return None if None in hours else sum(hour for hour in hours if hour is not None)


def _total(plan: Plan, runs_on: str) -> str:
    hours = total_hours(plan, runs_on)
    return "–" if hours is None else significant(hours)


def _memory(plan: Plan) -> Table:
    table = _table("Memory per process, at most", "process", "GiB")
    for step in plan.steps:
        if step.memory is not None:
            who = "a rank" if step.runs_on == "rank" else "a map's task"
            table.add_row(f"{who} in {step.name}", gibibytes(step.memory))
    table.add_row("the driver", gibibytes(plan.driver_memory))
    table.add_row("beside each replica that scores, who hands it the blocks", gibibytes(plan.hand_memory))
    table.add_section()
    for stage, free in plan.free.items():
        table.add_row(f"free for a rank with {stage}'s model loaded", gibibytes(free))
    for groups in plan.groups:
        passes = "pass" if groups.passes == 1 else "passes"
        table.add_row(
            f"factors of {groups.stage}'s largest group ({groups.maps} maps, {groups.passes} {passes})",
            gibibytes(groups.largest),
        )
    return table


def _storage(plan: Plan) -> Table:
    table = _table("Storage", "what", "GiB")
    for stored in plan.stored:
        table.add_row(stored.name, gibibytes(stored.bytes))
    table.add_section()
    table.add_row("all", gibibytes(sum(stored.bytes for stored in plan.stored)))
    return table


def _explanations(plan: Plan) -> list[str]:
    lines = []
    hours = total_hours(plan, "rank")
    if plan.device is not None:
        lines.append(
            f"Measured: the rate of each step and the memory of a rank, on a few real batches on this device "
            f"({plan.device}); the driver's memory; bytes per Parquet row. Estimated: everything else, from shapes."
        )
    else:
        lines.append(
            "Measured: the driver's memory and bytes per Parquet row. No model was run, so there are no hours."
        )
    if plan.device is not None and hours is not None:
        devices = plan.replicas * plan.ranks_per_replica
        lines.append(
            f"{significant(hours)} device-hours on {devices} such device{'s' if devices > 1 else ''} take "
            f"{significant(hours / devices)} h at best, without starting up, loading models and tasks per map."
        )
    lines.append(f"{number(plan.pairs)} scores. A step that is finished in {plan.run_dir} is counted all the same.")
    return lines + plan.notes
