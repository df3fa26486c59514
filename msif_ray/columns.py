"""Tables on a terminal of whatever width: no word and no number of theirs is broken."""

import re
from dataclasses import replace

from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table

_WORD = re.compile(r"(?:[≈<] )?\S+")
_UNBOUNDED = 10_000


def print_table(table: Table, console: Console) -> None:
    """Prints a table of plain texts. Where it is wider than the console, its headings take several lines, its columns
    stand closer, and cells are wrapped between words; where that is not enough, lines are longer than the console."""
    if console.measure(table, options=replace(console.options, max_width=_UNBOUNDED)).maximum > console.width:
        table.padding = (0, 1, 0, 0)
        for column in table.columns:
            column.header = re.sub(r" |(?<=-)", "\n", str(column.header))
            column.min_width = _longest_word(column)
    console.print(table, highlight=False, crop=False)


def _longest_word(column: Column) -> int:
    texts = [str(column.header), *map(str, column.cells)]
    return max((cell_len(word) for text in texts for word in _WORD.findall(text)), default=0)
