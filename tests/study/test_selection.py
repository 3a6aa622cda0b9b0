"""Ranks of configurations and the choice among them."""

from typing import Any

from modis_dist.study.selection import by_rank, chosen, mark


def group(
    lr: float, mean: float | None, *, condition: str = "a", n: int = 5, pruned: int | None = None
) -> dict[str, Any]:
    cut = {"pruned": None if pruned is None else {"epoch": pruned, "rank": 3, "of": 3}}
    return {"condition": condition, "params": {"optim.lr": lr}, "mean": mean, "n": n, "expected": 5, **cut}


def rates(groups: list[dict[str, Any]]) -> list[float]:
    return [group["params"]["optim.lr"] for group in groups]


def test_complete_groups_rank_before_pruned_ones_and_those_before_incomplete_ones() -> None:
    groups = [
        group(1, None, n=0),
        group(2, 0.99, n=4),
        group(3, 0.9, pruned=20),
        group(4, 0.5),
        group(5, 0.7, pruned=60),
        group(6, 0.95, pruned=20),
        group(7, 0.6),
    ]
    assert rates(by_rank(mark(groups, metric="nmi"))) == [7, 4, 5, 6, 3, 2, 1]
    assert rates(by_rank(mark(groups, metric="reconstruction_mse"))) == [4, 7, 5, 3, 6, 2, 1]


def test_the_smallest_error_is_chosen_and_the_largest_score() -> None:
    groups = [group(1, 0.81), group(2, 0.79)]
    assert rates([*chosen(mark(groups, metric="reconstruction_mse")).values()]) == [2]
    assert rates([*chosen(mark(groups, metric="nmi")).values()]) == [1]


def test_the_first_of_equal_groups_is_chosen() -> None:
    assert [row["chosen"] for row in mark([group(1, 0.5), group(2, 0.5)], metric="ari")] == [True, False]


def test_a_group_that_lacks_a_trial_or_was_pruned_is_not_chosen() -> None:
    groups = [group(1, 0.81, n=3), group(2, 0.79), group(3, 0.9, pruned=20)]
    assert [row["chosen"] for row in mark(groups, metric="nmi")] == [False, True, False]
    assert chosen(mark([groups[0], groups[2]], metric="nmi")) == {}


def test_conditions_keep_their_order_and_each_has_its_own_choice() -> None:
    groups = [group(1, 0.2, condition="b"), group(2, 0.9), group(3, 0.3, condition="b"), group(4, 0.8)]
    marked = mark(groups, metric="nmi")
    assert [row["rank"] for row in marked] == [4, 1, 3, 2]
    assert rates(by_rank(marked)) == [3, 1, 2, 4]
    assert {name: row["params"]["optim.lr"] for name, row in chosen(marked).items()} == {"b": 3, "a": 2}
