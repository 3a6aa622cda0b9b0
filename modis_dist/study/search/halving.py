"""Successive halving: who is among the best at a rung (Jamieson and Talwalkar 2016; rungs as in Li et al. 2020)."""

from collections.abc import Iterable, Mapping, Sequence
from math import inf

from modis_dist.metrics import LOWER_IS_BETTER
from modis_dist.study.aggregate import Verdict, spread
from modis_dist.train.progress import improves


def best_up_to(history: Iterable[Mapping[str, float | None]], epoch: int, *, metric: str) -> float | None:
    """The best validation metric of the first ``epoch`` epochs, None where it was never defined."""
    best: float | None = None
    for row in history:
        value = row.get(f"val/{metric}")
        if row["epoch"] is not None and row["epoch"] <= epoch and value is not None:
            best = value if improves(value, best, metric=metric) else best
    return best


def verdicts(groups: Sequence[Sequence[float | None]], *, epoch: int, factor: int, metric: str) -> list[Verdict]:
    """What becomes of groups of values at a rung: the best 1 / ``factor`` of them go on, at least one.

    A group with an undefined value comes last; of equals the first is better.
    """
    sign = 1 if metric in LOWER_IS_BETTER else -1
    figures = [spread(values) for values in groups]
    score = [
        inf if mean is None or None in values else sign * mean
        for values, mean in zip(groups, (figure["mean"] for figure in figures), strict=True)
    ]
    order = sorted(range(len(groups)), key=lambda place: score[place])
    rank = {place: number for number, place in enumerate(order, start=1)}
    staying = max(1, len(groups) // factor)
    return [
        {"epoch": epoch, **figure, "rank": rank[place], "of": len(groups), "goes_on": rank[place] <= staying}
        for place, figure in enumerate(figures)
    ]


def told(verdict: Verdict) -> str:
    """``pruned at epoch 20: 0.710, rank 7 of 9``."""
    value = "no value" if verdict["mean"] is None else f"{verdict['mean']:.3f}"
    return f"pruned at epoch {verdict['epoch']}: {value}, rank {verdict['rank']} of {verdict['of']}"
