"""Tables in markdown."""

from collections.abc import Iterable


def markdown_table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """
    A table of `header` and `rows`, each a cell per column; rows that are shorter are filled with empty cells. None is
    an empty cell.
    """
    header = list(header)
    return "\n".join([_row(header, header), "|" + "---|" * len(header), *(_row(row, header) for row in rows)])


def plus_minus(figure: dict[str, float | None], style: str) -> str:
    """Such as "0.123 ± 0.004" of {"mean", "standard_error"}, in `style` (".3f"); a None has no error."""
    error = figure["standard_error"]
    return f"{figure['mean']:{style}}" + ("" if error is None else f" ± {error:{style}}")


def _row(cells: Iterable[object], header: list[object]) -> str:
    cells = ["" if cell is None else str(cell) for cell in cells]
    return f"| {' | '.join(cells + [''] * (len(header) - len(cells)))} |"
