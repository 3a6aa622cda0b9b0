"""Successive halving: the best groups at a rung (Jamieson and Talwalkar 2016; rungs as in Li et al. 2020)."""

from collections.abc import Iterable, Mapping, Sequence
from math import inf

from modis_dist.metrics import LOWER_IS_BETTER
from modis_dist.study.aggregate import Verdict, spread
from modis_dist.train.progress import improves


def best_up_to(history: Iterable[Mapping[str, float | None]], epoch: int, *, metric: str) -> float | None:
    """Return the best validation metric of the first ``epoch`` epochs; None if it was never defined."""
    best: float | None = None
    for row in history:
        value = row.get(f"val/{metric}")
        if row["epoch"] is not None and row["epoch"] <= epoch and value is not None:
            best = value if improves(value, best, metric=metric) else best
    return best


def verdicts(groups: Sequence[Sequence[float | None]], *, epoch: int, factor: int, metric: str) -> list[Verdict]:
    """Return the verdict on every group of values at a rung: the best 1 / ``factor``, at least one, continue.

    A group with an undefined value ranks last; among equal groups the first ranks higher.
    """
    sign = 1 if metric in LOWER_IS_BETTER else -1
    spreads = [spread(values) for values in groups]

    def score(position: int) -> float:
        mean = spreads[position]["mean"]
        return inf if mean is None or None in groups[position] else sign * mean

    rank = {position: number for number, position in enumerate(sorted(range(len(groups)), key=score), start=1)}
    num_promoted = max(1, len(groups) // factor)
    return [
        {
            "epoch": epoch,
            **values,
            "rank": rank[position],
            "of": len(groups),
            "promoted": rank[position] <= num_promoted,
        }
        for position, values in enumerate(spreads)
    ]


def verdict_message(verdict: Verdict) -> str:
    """Return ``pruned at epoch 20: 0.710, rank 7 of 9``."""
    value = "no value" if verdict["mean"] is None else f"{verdict['mean']:.3f}"
    return f"pruned at epoch {verdict['epoch']}: {value}, rank {verdict['rank']} of {verdict['of']}"
