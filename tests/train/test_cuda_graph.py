"""A recorded step, on a stand-in for a GPU's recorder: what it is given, and when it is recorded anew."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from modis_dist.objective import Batch, Rules, Terms, Weights
from modis_dist.train.cuda_graph import WARM_UP, Captured, Inputs
from tests.numeric.toy_system import batch, start, weights
from tests.train.recorders import Replays


class CannotRecord(Replays):
    def record(self, step: Callable[[], Terms]) -> tuple[Callable[[], object], Terms]:  # noqa: ARG002
        self.recorded += 1
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")


def sums(given: Batch, _: Weights, __: Rules) -> Terms:
    """Terms that tell every tensor of a batch."""
    held = [
        *given.x,
        given.label,
        given.sample,
        given.noise_d,
        given.noise_g,
        *([] if given.signs is None else [given.signs]),
    ]
    return Terms(torch.zeros(1), parts={str(n): tensor.sum() for n, tensor in enumerate(held)})


def same(found: Terms, given: Batch) -> bool:
    expected: dict[str, Tensor] = sums(given, weights(), Rules()).parts
    return found.parts.keys() == expected.keys() and all(
        torch.equal(found.parts[name], expected[name]) for name in expected
    )


def test_every_step_is_given_its_own_batch_before_and_after_it_is_recorded() -> None:
    recorder, how, rules = Replays(), weights(), Rules()
    step = Captured(recorder, Inputs())
    for number in range(WARM_UP + 3):
        given = batch(number, signs=True)
        assert same(step(sums, given, how, rules), given), number
    assert (recorder.aside_, recorder.recorded, recorder.replayed) == (WARM_UP, 1, 3)


def test_a_batch_that_was_given_is_never_written_to() -> None:
    step, how, rules = Captured(Replays(), Inputs()), weights(), Rules()
    first = batch(1, signs=True)
    before = batch(1, signs=True)
    for number in (1, 1, 1, 1, 2):
        step(sums, first if number == 1 else batch(number, signs=True), how, rules)
    assert same(sums(first, how, rules), before)


def test_other_sizes_weights_or_rules_are_recorded_anew_after_warming_up() -> None:
    recorder, how, rules = Replays(), weights(), Rules()
    step = Captured(recorder, Inputs())

    def recordings_after(given: Batch, how: Weights, rules: Rules) -> int:
        for _ in range(WARM_UP + 1):
            assert same(step(sums, given, how, rules), given)
        return recorder.recorded

    assert recordings_after(batch(1), how, rules) == 1
    assert recordings_after(batch(1), how, rules) == 1
    other = replace(how)
    assert recordings_after(batch(1), other, rules) == 2
    assert recordings_after(batch(1), other, Rules(kl_reduction="mean")) == 3
    assert recordings_after(batch(1, replicates=2), other, Rules(kl_reduction="mean")) == 4
    step.forget()
    assert recordings_after(batch(1, replicates=2), other, Rules(kl_reduction="mean")) == 5


def test_a_step_that_cannot_be_recorded_is_taken_each_time_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    recorder, how = CannotRecord(), weights()
    step = Captured(recorder, Inputs())
    for number in range(WARM_UP + 4):
        given = batch(number)
        assert same(step(sums, given, how, Rules()), given)
    other = Captured(recorder, Inputs())
    for number in range(WARM_UP + 2):
        assert same(other(sums, batch(number), how, Rules()), batch(number))
    assert (recorder.aside_, recorder.recorded) == (WARM_UP + 4 + WARM_UP + 2, 1)
    assert [record.message for record in caplog.records] == [
        "a step cannot be recorded, which is slower: operation not permitted when stream is capturing"
    ]


def test_of_two_sides_one_that_was_recorded_goes_on_where_the_other_cannot_be() -> None:
    recorder, inputs, how = Replays(), Inputs(), weights()
    ours, theirs = Captured(recorder, inputs), Captured(recorder, inputs)
    for number in range(WARM_UP + 1):
        ours(sums, batch(number), how, Rules())
    recorder.refused = True
    for number in range(WARM_UP + 2):
        given = batch(10 + number)
        assert same(ours(sums, given, how, Rules()), given) and same(theirs(sums, given, how, Rules()), given)
    assert (recorder.recorded, recorder.replayed, recorder.aside_) == (1, WARM_UP + 3, 2 * WARM_UP + 2)


def test_two_sides_read_a_batch_at_one_place_where_it_is_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, given = Inputs(), batch(1, signs=True)
    held = inputs.filled(given)
    copies: list[Tensor] = []
    copy = Tensor.copy_
    monkeypatch.setattr(Tensor, "copy_", lambda kept, *rest, **how: copies.append(kept) or copy(kept, *rest, **how))
    assert inputs.filled(given) is held and not copies
    second = batch(2, signs=True)
    assert inputs.filled(second) is held and inputs.filled(second) is held
    assert len(copies) == len(second.x) + 5
    assert same(sums(held, weights(), Rules()), second)


def test_a_batch_of_other_sizes_has_another_place_and_steps_that_read_the_first_are_recorded_anew() -> None:
    recorder, inputs, how = Replays(), Inputs(), weights()
    ours, theirs = Captured(recorder, inputs), Captured(recorder, inputs)
    for number in range(WARM_UP + 1):
        ours(sums, batch(number), how, Rules())
        theirs(sums, batch(number), how, Rules())
    for number in range(WARM_UP + 1):
        ours(sums, batch(number, rows=4), how, Rules())
    again = batch(9)
    assert same(theirs(sums, again, how, Rules()), again)
    assert recorder.recorded == 4


def test_a_step_leaves_no_graph_behind_and_a_dropped_state_its_memory_at_once() -> None:
    start()  # the first optimiser of a process loads modules that keep hold of who loaded them
    gc.disable()
    try:
        state = start()
        terms = state.adversary.learn(batch(), weights(), Rules())
        assert terms.loss.grad_fn is None and not any(part.requires_grad for part in terms.parts.values())
        state.vaes.learn(batch(), weights(), Rules())
        held = [weakref.ref(state), weakref.ref(state.model.vaes[0].mu.weight)]
        del state, terms
        assert [one() for one in held] == [None, None]
    finally:
        gc.enable()
