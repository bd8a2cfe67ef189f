"""Means and shares with what they may be off by."""

import math
import statistics
from collections.abc import Sequence

from scipy import stats


CONFIDENCE = 0.95


def mean_and_error(values: Sequence[float]) -> dict[str, float | None]:
    """Mean of independent values and its standard error, which is None for a single one."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error}


def student_interval(values: Sequence[float]) -> list[float]:
    """Student's 95% interval for the mean of two or more independent normal values."""
    if len(set(values)) == 1:
        return [values[0], values[0]]  # where SciPy has nan
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, statistics.fmean(values), stats.sem(values))
    return [float(low), float(high)]


def normal_interval(value: float, standard_error: float) -> list[float]:
    """95% interval around a value whose standard error is known."""
    half_width = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * standard_error
    return [value - half_width, value + half_width]


def wilson_interval(share: float, count: int) -> list[float]:
    """Wilson (1927): where a share of `count` independent draws puts the probability, with confidence 95%."""
    interval = stats.binomtest(round(share * count), count).proportion_ci(CONFIDENCE, method="wilson")
    return [float(end) for end in interval]
