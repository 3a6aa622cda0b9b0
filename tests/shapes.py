"""Shapes that annotations promise, checked at every call; in tests of formulas only, for it is slower than training."""

from collections.abc import Iterator
from contextlib import contextmanager

import jaxtyping


def check(wanted: bool) -> None:
    """Of the packages that `--jaxtyping-packages` names in pyproject.toml."""
    jaxtyping.config.update("jaxtyping_disable", not wanted)


@contextmanager
def checked() -> Iterator[None]:
    """Inside, they are."""
    before = not jaxtyping.config.jaxtyping_disable
    check(True)
    try:
        yield
    finally:
        check(before)
