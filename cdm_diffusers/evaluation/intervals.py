"""Means and shares with their uncertainty."""

import math
import statistics
from collections.abc import Sequence


CONFIDENCE = 0.95
NORMAL_QUANTILE = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


def mean_and_error(values: Sequence[float]) -> dict[str, float | None]:
    """Mean of independent values and its standard error, which is None for a single one."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error}


def student_interval(values: Sequence[float]) -> list[float]:
    """Student's 95% interval for the mean of two or more independent normal values."""
    return interval_of_mean(statistics.fmean(values), statistics.stdev(values), len(values))


def interval_of_mean(mean: float, deviation: float, count: int) -> list[float]:
    """Student's 95% interval around the mean of `count` independent normal values of this standard deviation."""
    from scipy import stats

    return _around(mean, float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * deviation / math.sqrt(count))


def normal_interval(value: float, standard_error: float) -> list[float]:
    """95% interval around a value whose standard error is known."""
    return _around(value, NORMAL_QUANTILE * standard_error)


def wilson_interval(share: float, count: int) -> list[float]:
    """Wilson's (1927) 95% interval for the probability behind a share of `count` independent draws."""
    share = round(share * count) / count
    weight = NORMAL_QUANTILE**2 / count
    centre = (share + weight / 2) / (1 + weight)
    half_width = math.sqrt(weight * share * (1 - share) + weight**2 / 4) / (1 + weight)
    return [centre - half_width if share > 0 else 0.0, centre + half_width if share < 1 else 1.0]


def _around(value: float, half_width: float) -> list[float]:
    return [value - half_width, value + half_width]
