"""Configurations proposed by Optuna: a pure function of the results, within the space, better than chance."""

from math import log10
from typing import Any

import numpy as np

from modis_dist.config.study import Dimension
from modis_dist.study.search.space import drawn
from modis_dist.study.search.tpe import Outcome, proposals

SPACE = {
    key: Dimension.model_validate(example)
    for key, example in {
        "optim.lr": {"low": 1e-5, "high": 1e-1, "log": True},
        "optim.batch_size": {"low": 8, "high": 40, "step": 16},
        "model.latent": {"low": 2, "high": 64, "log": True},
        "model.ratios": {"choices": [[1.0], [1.0, 0.5], [True]]},
    }.items()
}
METRIC = "balanced_accuracy"


def outcomes(count: int) -> list[Outcome]:
    """Return outcomes that are better the nearer the learning rate is to 1e-3; some are pruned, some failed."""
    results = []
    for number in range(count):
        params = drawn(SPACE, seed=3, number=number)
        mean = 1 - abs(log10(params["optim.lr"]) + 3) / 4
        results.append(Outcome(params, None if number % 7 == 6 else mean, 20 if mean < 0.6 else None))
    return results


def proposed(known: list[Outcome], *, count: int = 6, seed: int = 0, number: int = 2) -> list[dict[str, Any]]:
    return proposals(SPACE, known, count=count, seed=seed, number=number, metric=METRIC)


def test_the_same_results_give_the_same_proposals_and_other_rounds_and_seeds_give_others() -> None:
    known = outcomes(15)
    assert proposed(known) == proposed(known)
    assert proposed(known) != proposed(known, seed=1) and proposed(known) != proposed(known, number=3)
    assert proposed(known, count=3) == proposed(known)[:3]


def test_proposals_lie_in_the_space_with_whole_numbers_and_three_digits() -> None:
    for proposal in proposed(outcomes(15), count=40):
        assert set(proposal) == set(SPACE)
        assert 1e-5 <= proposal["optim.lr"] <= 1e-1 and float(f"{proposal['optim.lr']:.3g}") == proposal["optim.lr"]
        assert proposal["optim.batch_size"] in (8, 24, 40) and type(proposal["optim.batch_size"]) is int
        assert 2 <= proposal["model.latent"] <= 64 and type(proposal["model.latent"]) is int
        assert proposal["model.ratios"] in [[1.0], [1.0, 0.5], [True]]


def test_proposals_are_nearer_to_the_best_than_random_draws() -> None:
    def distance(configurations: list[dict[str, Any]]) -> float:
        return float(np.mean([abs(log10(proposal["optim.lr"]) + 3) for proposal in configurations]))

    known = outcomes(30)
    assert distance(proposed(known, count=20)) < 0.7 * distance([dict(proposal.params) for proposal in known])


def test_an_error_metric_is_minimised() -> None:
    known = [
        Outcome(proposal.params, None if proposal.mean is None else 1 - proposal.mean) for proposal in outcomes(30)
    ]
    proposed_values = proposals(SPACE, known, count=20, seed=0, number=1, metric="reconstruction_mse")
    assert np.mean([abs(log10(proposal["optim.lr"]) + 3) for proposal in proposed_values]) < 0.7


def test_proposals_are_made_without_any_result() -> None:
    failed = [Outcome(proposal.params, None) for proposal in outcomes(4)]
    assert len(proposed(failed)) == 6
