"""Rank against agreement, time and memory on the demo's pair: `python jobs/rank_table.py --folder runs/ranks`."""

import math
import sys
from typing import Annotated

import typer

from msif_ray.demo.ranks import rank_table
from msif_ray.errors import UserError


def main(
    folder: Annotated[str, typer.Option(help="Where the fit and the directions are kept.")] = "runs/ranks",
    queries: Annotated[int, typer.Option(min=1)] = 40,
    documents: Annotated[int, typer.Option(min=2)] = 3000,
    memory: Annotated[float, typer.Option(min=0, help="GiB for directions; the rest is read from disk.")] = 2.0,
) -> None:
    """Rank against agreement, time and memory on the demo's pair."""
    if not math.isfinite(memory):
        raise UserError(f"--memory: {memory} is no number of GiB")
    rank_table(folder, queries, documents, max(1, int(memory * 2**30)))  # a rank takes 0 for what is free


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        sys.exit(f"rank_table: {error}")
