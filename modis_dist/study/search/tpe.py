"""Configurations proposed by Optuna's TPE sampler. The only module that imports Optuna.

No state of Optuna is stored: its study is rebuilt from the results for every round, so the same results always give the
same proposals.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from modis_dist.config.keys import is_whole
from modis_dist.config.study import Dimension
from modis_dist.metrics import LOWER_IS_BETTER
from modis_dist.report.study_results import Params
from modis_dist.study.search.space import Space, ends, rounded, step_of
from modis_dist.train.seeds import mix

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class Outcome:
    """The result of a configuration: the mean over its group, None if the group is not complete."""

    params: Params
    mean: float | None
    pruned_at: int | None = None  # epoch of its last rung, where ``mean`` was measured


def proposals(
    space: Space, outcomes: Sequence[Outcome], *, count: int, seed: int, number: int, metric: str
) -> list[Params]:
    """Return the configurations of round ``number``, proposed from the outcomes of all rounds before it.

    Bergstra et al. 2011, with Optuna's defaults; every round has its own seed.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        direction="minimize" if metric in LOWER_IS_BETTER else "maximize",
        sampler=optuna.samplers.TPESampler(seed=mix(seed, "round", number) % 2**32),
    )
    distributions = {key: _distribution(dimension, whole=is_whole(key)) for key, dimension in space.items()}
    study.add_trials([_frozen_trial(space, distributions, outcome) for outcome in outcomes])
    proposed = [study.ask(distributions).params for _ in range(count)]
    return [
        {key: _value(dimension, params[key], whole=is_whole(key)) for key, dimension in space.items()}
        for params in proposed
    ]


def _distribution(dimension: Dimension, *, whole: bool) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if dimension.choices is not None:
        return CategoricalDistribution(range(len(dimension.choices)))  # by position: a choice may be a list
    low, high = ends(dimension)
    step = step_of(dimension, whole=whole)
    if whole:
        return IntDistribution(int(low), int(high), log=dimension.log, step=int(step or 1))
    return FloatDistribution(low, high, log=dimension.log, step=step)


def _frozen_trial(space: Space, distributions: Mapping[str, "BaseDistribution"], outcome: Outcome) -> "FrozenTrial":
    from optuna.trial import TrialState, create_trial

    params = {key: _position(dimension, outcome.params[key]) for key, dimension in space.items()}
    create = partial(create_trial, params=params, distributions=dict(distributions))
    if outcome.mean is None:
        return create(state=TrialState.FAIL)
    if outcome.pruned_at is not None:
        return create(state=TrialState.PRUNED, intermediate_values={outcome.pruned_at: outcome.mean})
    return create(value=outcome.mean)


def _position(dimension: Dimension, value: Any) -> Any:
    """Return the position of a choice in its list, a number of a range as it is."""
    if dimension.choices is None:
        return value
    return [json.dumps(choice) for choice in dimension.choices].index(json.dumps(value))


def _value(dimension: Dimension, proposed: Any, *, whole: bool) -> Any:
    return rounded(dimension, proposed, whole=whole) if dimension.choices is None else dimension.choices[proposed]
