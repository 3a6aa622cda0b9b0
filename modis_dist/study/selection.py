"""The rule that ranks the configurations of a study and chooses one of each condition, by validation rows.

Reports read the outcome from the keys ``rank`` and ``chosen`` of every group and apply no rule of their own.
"""

from collections.abc import Sequence
from math import inf

from modis_dist.metrics import LOWER_IS_BETTER
from modis_dist.report.study_results import Group, RankedGroup


def mark(groups: Sequence[Group], *, metric: str) -> list[RankedGroup]:
    """Return the groups with ``rank`` (from 1, over all conditions) and ``chosen`` (the best of its condition).

    Groups trained to the end come first, then pruned ones (the latest first), then those that lack a trial; each by
    ``mean``, the first of equals. A group that was pruned or lacks a trial is never chosen.
    """
    sign = 1 if metric in LOWER_IS_BETTER else -1

    def sort_key(position: int) -> tuple[bool, bool, float, float]:
        group = groups[position]
        mean, last_epoch = group["mean"], group["pruned"]["epoch"] if group["pruned"] else inf
        return mean is None, last_epoch == inf and lacks_trial(group), -last_epoch, 0.0 if mean is None else sign * mean

    order = sorted(range(len(groups)), key=sort_key)
    rank = {position: number for number, position in enumerate(order, start=1)}
    chosen: dict[str, int] = {}
    for position in order:
        group = groups[position]
        if group["mean"] is not None and not group["pruned"] and not lacks_trial(group):
            chosen.setdefault(group["condition"], position)
    return [
        {**group, "rank": rank[position], "chosen": chosen.get(group["condition"]) == position}
        for position, group in enumerate(groups)
    ]


def lacks_trial(group: Group) -> bool:
    """Return whether a trial of the group has no value."""
    return group["n"] < group["expected"]


def by_rank(groups: Sequence[RankedGroup]) -> list[RankedGroup]:
    """Return marked groups, those of each condition from the best to the worst."""
    conditions = list(dict.fromkeys(group["condition"] for group in groups))
    return sorted(groups, key=lambda group: (conditions.index(group["condition"]), group["rank"]))


def chosen(groups: Sequence[RankedGroup]) -> dict[str, RankedGroup]:
    """Return the chosen group of each condition that has one, of marked groups."""
    return {group["condition"]: group for group in groups if group["chosen"]}
