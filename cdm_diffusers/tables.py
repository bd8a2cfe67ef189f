"""Tables in markdown, and text that is not markdown in it."""

import html
import re
from collections.abc import Iterable


# Characters with a meaning inside a line. Underscores have one at the ends of words only.
_SPECIAL = re.compile(r"[\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])")


def escaped(text: str) -> str:
    """`text`, such as the name of a class, on one line of markdown or HTML that shows it as it is."""
    return html.escape(_SPECIAL.sub(r"\\\g<0>", " ".join(text.split())), quote=False)


def unescaped(text: str) -> str:
    """What [`escaped`] made `text` of."""
    return re.sub(r"\\(.)", r"\1", html.unescape(text))


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
