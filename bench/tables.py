"""Plain-text tables that can be printed row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Column:
    """A heading and a width; a cell that is wider pushes its row, never loses a digit."""

    heading: str
    width: int
    is_text: bool = False


class Table:
    """Prints its heading once, then a row at a time, so that a long run shows what it has."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self.columns = columns
        self._has_heading = False

    def row(self, *cells: object) -> None:
        """Print one row; None becomes a dash, floats get two decimals below 100 and none above."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for {len(self.columns)} columns")
        if not self._has_heading:
            print(self._line([column.heading for column in self.columns]))
            print("  ".join("-" * column.width for column in self.columns))
            self._has_heading = True
        print(self._line([format_cell(cell) for cell in cells]), flush=True)

    def _line(self, texts: Sequence[str]) -> str:
        pairs = zip(texts, self.columns, strict=True)
        return "  ".join(text.ljust(column.width) if column.is_text else text.rjust(column.width) for text, column in pairs).rstrip()


def format_cell(cell: object) -> str:
    """A cell as text."""
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.2f}" if abs(cell) < 100 else f"{cell:,.0f}"
    return str(cell)
