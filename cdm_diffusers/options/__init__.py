"""
Options and settings: declared once as a dataclass, checked whole, and read from Python, JSON or the command line.

Nothing here imports torch or numpy, so that `--help` and a misspelt option answer at once.
"""

from .command_line import parse
from .declarations import from_json, option, options
from .errors import errors_as_lines
from .hub import HubOptions, License
from .kinds import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


__all__ = [
    "Fraction",
    "HubOptions",
    "License",
    "NonNegativeFloat",
    "NonNegativeInt",
    "PositiveFloat",
    "PositiveInt",
    "errors_as_lines",
    "from_json",
    "option",
    "options",
    "parse",
]
