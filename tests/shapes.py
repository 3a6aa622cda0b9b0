"""Switch for runtime checks of shape annotations, which are slow: only tests of formulas enable them."""

from collections.abc import Iterator
from contextlib import contextmanager

import jaxtyping


def set_enabled(enabled: bool) -> None:
    """Enable or disable the checks in the packages listed by `--jaxtyping-packages` in pyproject.toml."""
    jaxtyping.config.update("jaxtyping_disable", not enabled)


@contextmanager
def checked() -> Iterator[None]:
    """Enable the checks inside the block."""
    previous = not jaxtyping.config.jaxtyping_disable
    set_enabled(True)
    try:
        yield
    finally:
        set_enabled(previous)
