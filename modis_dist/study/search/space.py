"""Configurations drawn from a search space, each a pure function of the seed, its number and the space."""

from collections.abc import Mapping
from math import exp, floor, log
from typing import Any

from modis_dist.config.keys import is_whole
from modis_dist.config.parse import digest
from modis_dist.config.study import Dimension

DIGITS = 3  # what is shown of a value is then all of it
STEP_DIGITS = 12  # a sum of steps without its rounding error

Space = Mapping[str, Dimension]


def drawn(space: Space, *, seed: int, number: int) -> dict[str, Any]:
    """The configuration of a number: one value of every key. Other keys and numbers change nothing in a value."""
    return {key: at(one, share(seed, number, key), whole=is_whole(key)) for key, one in space.items()}


def share(seed: int, number: int, key: str) -> float:
    """A uniform number in [0, 1)."""
    return int(digest(["search", seed, number, key])[:13], 16) / 16**13


def at(dimension: Dimension, place: float, *, whole: bool) -> Any:
    """The value at a place, in [0, 1), of a range or list."""
    if dimension.choices is not None:
        return dimension.choices[int(place * len(dimension.choices))]
    low, high = ends(dimension)
    step = step_of(dimension, whole=whole)
    if step is not None:
        values = floor((high - low) / step + 1e-9) + 1
        return rounded(dimension, low + step * int(place * values), whole=whole)
    if not dimension.log:
        return rounded(dimension, low + place * (high - low), whole=whole)
    margin = 0.5 if whole else 0.0  # so that the first and the last whole number are not drawn less
    bottom, top = log(low - margin), log(high + margin)
    return rounded(dimension, exp(bottom + place * (top - bottom)), whole=whole)


def ends(dimension: Dimension) -> tuple[float, float]:
    """Smallest and largest value of a range."""
    assert dimension.low is not None and dimension.high is not None, "a range has both"
    return dimension.low, dimension.high


def step_of(dimension: Dimension, *, whole: bool) -> float | None:
    """Distance between two values of a range, None where every number is one; whole numbers lie 1 apart."""
    return 1.0 if dimension.step is None and whole and not dimension.log else dimension.step


def rounded(dimension: Dimension, value: float, *, whole: bool) -> float | int:
    """A number of a range as it is used: whole, on its step, or with a few digits; within the range."""
    low, high = ends(dimension)
    digits = DIGITS if dimension.step is None else STEP_DIGITS
    near = round(value) if whole else float(f"{value:.{digits}g}")
    return type(near)(min(max(near, low), high))
