"""Configurations drawn from a search space: each is a pure function of the seed, its number and the space."""

from collections.abc import Mapping
from math import exp, floor, log
from typing import Any

from modis_dist.config.keys import is_whole
from modis_dist.config.parse import digest
from modis_dist.config.study import Dimension
from modis_dist.report.study_results import Params

DIGITS = 3  # significant digits, so that tables show complete values
STEP_DIGITS = 12  # drops the rounding error of a sum of steps

Space = Mapping[str, Dimension]


def drawn(space: Space, *, seed: int, number: int) -> Params:
    """Return configuration ``number``, a value for every key; a value does not depend on other keys or numbers."""
    return {key: at(dimension, uniform(seed, number, key), whole=is_whole(key)) for key, dimension in space.items()}


def uniform(seed: int, number: int, key: str) -> float:
    """Return a uniform number in [0, 1)."""
    return int(digest(["search", seed, number, key])[:13], 16) / 16**13


def at(dimension: Dimension, quantile: float, *, whole: bool) -> Any:
    """Return the value of a range or list at a quantile in [0, 1)."""
    if dimension.choices is not None:
        return dimension.choices[int(quantile * len(dimension.choices))]
    low, high = ends(dimension)
    step = step_of(dimension, whole=whole)
    if step is not None:
        values = floor((high - low) / step + 1e-9) + 1
        return rounded(dimension, low + step * int(quantile * values), whole=whole)
    if not dimension.log:
        return rounded(dimension, low + quantile * (high - low), whole=whole)
    margin = 0.5 if whole else 0.0  # so that the first and the last whole number are as likely as the others
    bottom, top = log(low - margin), log(high + margin)
    return rounded(dimension, exp(bottom + quantile * (top - bottom)), whole=whole)


def ends(dimension: Dimension) -> tuple[float, float]:
    """Return the smallest and largest value of a range."""
    assert dimension.low is not None and dimension.high is not None, "a range has two ends"
    return dimension.low, dimension.high


def step_of(dimension: Dimension, *, whole: bool) -> float | None:
    """Return the distance between neighbouring values of a range: 1 for whole numbers, None if it is continuous."""
    return 1.0 if dimension.step is None and whole and not dimension.log else dimension.step


def rounded(dimension: Dimension, value: float, *, whole: bool) -> float | int:
    """Return a number of a range rounded to a whole number, to its step or to a few digits, within the range."""
    low, high = ends(dimension)
    digits = DIGITS if dimension.step is None else STEP_DIGITS
    number = round(value) if whole else float(f"{value:.{digits}g}")
    return type(number)(min(max(number, low), high))
