"""Means of an epoch, reports of non-finite losses, and logs saved within an epoch."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from modis_dist.objective import Rules, Terms
from modis_dist.train.loss_log import LossLog, NonFinite
from tests.numeric.toy_system import batch, start, step, weights

NAMES = ["adversarial_d", "penalty/a", "penalty/b", "total_d", "kl/a", "kl/b", "total_g"]


def phases(values: Tensor) -> tuple[Terms, Terms]:
    """Return the two phases of a step with values [r, 7] in the order of NAMES."""
    first = Terms(values[:, 3], parts={"adversarial_d": values[:, 0], "penalty": values[:, 1:3]}, total=values[:, 3])
    return first, Terms(values[:, 6], parts={"kl": values[:, 4:6]}, total=values[:, 6])


def fresh(*, slots: int = 2, window: int = 4) -> LossLog:
    return LossLog(["a", "b"], slots=slots, window=window)


def steps(count: int, *, slots: int = 2) -> Tensor:
    return torch.arange(count * slots * 7, dtype=torch.float32).reshape(count, slots, 7)


def test_means_average_every_term_over_the_steps_of_the_epoch() -> None:
    log, values = fresh(), steps(7)
    for number, row in enumerate(values):
        log.record(*phases(row))
        if log.full():
            assert log.flush(update=number + 1) == []
    assert log.flush(update=7) == []
    expected = values.double().mean(0).tolist()
    assert log.means() == [{f"train/{n}": v for n, v in zip(NAMES, row, strict=True)} for row in expected]


def test_each_epoch_has_its_own_means() -> None:
    log, values = fresh(), steps(3)
    for number, row in enumerate(values):
        log.record(*phases(row))
        log.flush(update=number + 1)
        assert log.means()[1]["train/kl/b"] == float(row[1, 5])


def test_a_window_is_full_after_its_steps_and_empty_after_a_flush() -> None:
    log = fresh(window=3)
    for _ in range(3):
        assert not log.full()
        log.record(*phases(steps(1)[0]))
    assert log.full()
    log.flush(update=3)
    assert not log.full()
    assert log.flush(update=3) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", range(7))
def test_the_first_non_finite_loss_is_reported_with_slot_step_and_term(where: int, bad: float) -> None:
    log, values = fresh(window=5), steps(10)
    values[7, 1, where] = bad
    values[8:, 1, :] = float("nan")
    failures: list[NonFinite] = []
    for number, row in enumerate(values):
        log.record(*phases(row))
        if log.full():
            failures += log.flush(update=number + 1)
    assert [(f.slot, f.update, f.term) for f in failures] == [(1, 8, NAMES[where])]
    assert np.array_equal(failures[0].value, bad, equal_nan=True)
    assert str(failures[0]) == f"step 8: {NAMES[where]} is {bad}"


def test_every_slot_reports_its_first_non_finite_loss_and_the_others_keep_their_means() -> None:
    log, values = fresh(slots=3), steps(4, slots=3)
    values[1, 2, 4] = float("nan")
    values[3, 0, 0] = float("inf")
    for row in values:
        log.record(*phases(row))
    assert [(f.slot, f.update, f.term) for f in log.flush(update=40)] == [(0, 40, NAMES[0]), (2, 38, NAMES[4])]
    log.without([0, 2])
    assert list(log.means()[0].values()) == values[:, 1].double().mean(0).tolist()


def test_a_log_restored_from_json_continues_with_the_same_means() -> None:
    values = steps(9) / 7
    whole, halves = fresh(), fresh()
    for number, row in enumerate(values):
        for log in (whole, halves):
            log.record(*phases(row))
            log.flush(update=number + 1)
        if number == 4:
            saved = json.loads(json.dumps(halves.state()))
            halves = fresh()
            halves.restore(saved)
            assert halves.state() == saved
    assert halves.means() == whole.means()


def test_a_log_can_be_saved_and_restored_before_its_first_step() -> None:
    log = fresh()
    log.restore(json.loads(json.dumps(fresh().state())))
    log.record(*phases(steps(1)[0]))
    log.flush(update=1)
    assert [len(row) for row in log.means()] == [7, 7]


def test_a_log_with_an_unflushed_window_cannot_be_saved() -> None:
    log = fresh()
    log.record(*phases(steps(1)[0]))
    with pytest.raises(AssertionError, match="flush"):
        log.state()


def test_means_of_a_real_step_pair_every_name_with_its_value() -> None:
    state = start([1])
    log = LossLog(state.model.modalities, slots=1, window=1)
    terms = step(state, batch(1), weights(), Rules())
    log.record(*terms)
    log.flush(update=1)
    means = log.means()[0]
    for phase, total in zip(terms, ("total_d", "total_g"), strict=True):
        assert means[f"train/{total}"] == pytest.approx(phase.total.item(), rel=1e-12)
        for name, part in phase.parts.items():
            for m, modality in enumerate("abc"):
                key, value = (f"{name}/{modality}", part[0, m]) if part.dim() == 2 else (name, part[0])
                assert means[f"train/{key}"] == pytest.approx(float(value), rel=1e-12)


def test_a_member_without_penalty_continues_after_the_only_one_with_penalty_stops() -> None:
    state = start([1, 2])
    log = LossLog(state.model.modalities, slots=2, window=1)
    log.record(*step(state, batch(1, slots=2), weights(["pairwise"] * 2, penalty_weight=[0.0, 1.0]), Rules()))
    log.flush(update=1)
    log.without([1])
    state = state.without([1])
    log.record(*step(state, batch(2), weights(penalty_weight=0.0), Rules()))
    assert log.flush(update=2) == []
    assert log.means()[0]["train/penalty/a"] == 0


def test_of_several_non_finite_terms_in_a_step_the_first_with_a_modality_is_reported() -> None:
    log, values = fresh(), steps(2)
    values[1, 0, [0, 3, 5, 6]] = float("nan")
    for row in values:
        log.record(*phases(row))
    assert [(f.slot, f.update, f.term) for f in log.flush(update=2)] == [(0, 2, "kl/b")]
