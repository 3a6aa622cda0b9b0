"""Captured steps on a stand-in for CUDA graphs: inputs and recapture."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from modis_dist.objective import Batch, Rules, Terms, Weights
from modis_dist.train.cuda_graph import WARM_UP, CapturedStep, Inputs
from tests.numeric.toy_system import batch, start, weights
from tests.train.captures import Replays


class CannotCapture(Replays):
    def capture(self, step: Callable[[], Terms]) -> tuple[Callable[[], object], Terms]:  # noqa: ARG002
        self.captured += 1
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")


def sums(inputs: Batch, _: Weights, __: Rules) -> Terms:
    """Return terms that depend on every tensor of a batch."""
    totals = [
        *inputs.x,
        inputs.label,
        inputs.sample,
        inputs.noise_d,
        inputs.noise_g,
        *([] if inputs.signs is None else [inputs.signs]),
    ]
    return Terms(torch.zeros(1), parts={str(n): tensor.sum() for n, tensor in enumerate(totals)})


def same(terms: Terms, inputs: Batch) -> bool:
    expected: dict[str, Tensor] = sums(inputs, weights(), Rules()).parts
    return terms.parts.keys() == expected.keys() and all(
        torch.equal(terms.parts[name], expected[name]) for name in expected
    )


def test_every_step_gets_its_own_batch_before_and_after_capture() -> None:
    capture, loss_weights, rules = Replays(), weights(), Rules()
    step = CapturedStep(capture, Inputs())
    for number in range(WARM_UP + 3):
        inputs = batch(number, signs=True)
        assert same(step(sums, inputs, loss_weights, rules), inputs), number
    assert (capture.warmed_up, capture.captured, capture.replayed) == (WARM_UP, 1, 3)


def test_the_batch_of_the_caller_is_never_modified() -> None:
    step, loss_weights, rules = CapturedStep(Replays(), Inputs()), weights(), Rules()
    first = batch(1, signs=True)
    before = batch(1, signs=True)
    for number in (1, 1, 1, 1, 2):
        step(sums, first if number == 1 else batch(number, signs=True), loss_weights, rules)
    assert same(sums(first, loss_weights, rules), before)


def test_other_sizes_weights_or_rules_are_captured_again_after_warm_up() -> None:
    capture, loss_weights, rules = Replays(), weights(), Rules()
    step = CapturedStep(capture, Inputs())

    def captures_after(inputs: Batch, loss_weights: Weights, rules: Rules) -> int:
        for _ in range(WARM_UP + 1):
            assert same(step(sums, inputs, loss_weights, rules), inputs)
        return capture.captured

    assert captures_after(batch(1), loss_weights, rules) == 1
    assert captures_after(batch(1), loss_weights, rules) == 1
    other = replace(loss_weights)
    assert captures_after(batch(1), other, rules) == 2
    assert captures_after(batch(1), other, Rules(kl_reduction="mean")) == 3
    assert captures_after(batch(1, slots=2), other, Rules(kl_reduction="mean")) == 4
    step.invalidate()
    assert captures_after(batch(1, slots=2), other, Rules(kl_reduction="mean")) == 5


def test_after_a_failed_capture_steps_run_eagerly_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    capture, loss_weights = CannotCapture(), weights()
    step = CapturedStep(capture, Inputs())
    for number in range(WARM_UP + 4):
        inputs = batch(number)
        assert same(step(sums, inputs, loss_weights, Rules()), inputs)
    other = CapturedStep(capture, Inputs())
    for number in range(WARM_UP + 2):
        assert same(other(sums, batch(number), loss_weights, Rules()), batch(number))
    assert (capture.warmed_up, capture.captured) == (WARM_UP + 4 + WARM_UP + 2, 1)
    (message,) = [record.message for record in caplog.records]
    assert "operation not permitted when stream is capturing" in message


def test_a_captured_learner_is_replayed_even_if_the_other_cannot_be_captured() -> None:
    capture, inputs, loss_weights = Replays(), Inputs(), weights()
    first_step, second_step = CapturedStep(capture, inputs), CapturedStep(capture, inputs)
    for number in range(WARM_UP + 1):
        first_step(sums, batch(number), loss_weights, Rules())
    capture.failed = True
    for number in range(WARM_UP + 2):
        example = batch(10 + number)
        assert same(first_step(sums, example, loss_weights, Rules()), example) and same(
            second_step(sums, example, loss_weights, Rules()), example
        )
    assert (capture.captured, capture.replayed, capture.warmed_up) == (1, WARM_UP + 3, 2 * WARM_UP + 2)


def test_both_learners_share_input_buffers_that_are_filled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, example = Inputs(), batch(1, signs=True)
    filled = inputs.fill(example)
    copies: list[Tensor] = []
    copy = Tensor.copy_
    monkeypatch.setattr(
        Tensor, "copy_", lambda target, *rest, **options: copies.append(target) or copy(target, *rest, **options)
    )
    assert inputs.fill(example) is filled and not copies
    second = batch(2, signs=True)
    assert inputs.fill(second) is filled and inputs.fill(second) is filled
    assert len(copies) == len(second.x) + 5
    assert same(sums(filled, weights(), Rules()), second)


def test_a_batch_of_other_sizes_gets_new_buffers_and_steps_on_the_old_ones_are_captured_again() -> None:
    capture, inputs, loss_weights = Replays(), Inputs(), weights()
    first_step, second_step = CapturedStep(capture, inputs), CapturedStep(capture, inputs)
    for number in range(WARM_UP + 1):
        first_step(sums, batch(number), loss_weights, Rules())
        second_step(sums, batch(number), loss_weights, Rules())
    for number in range(WARM_UP + 1):
        first_step(sums, batch(number, rows=4), loss_weights, Rules())
    again = batch(9)
    assert same(second_step(sums, again, loss_weights, Rules()), again)
    assert capture.captured == 4


def test_a_step_leaves_no_graph_and_a_dropped_state_frees_its_memory_at_once() -> None:
    start()  # the first optimiser of a process imports modules that keep references to their importer
    gc.disable()
    try:
        state = start()
        terms = state.adversary.learn(batch(), weights(), Rules())
        assert not terms.loss.requires_grad and not any(part.requires_grad for part in terms.parts.values())
        state.vaes.learn(batch(), weights(), Rules())
        references = [weakref.ref(state), weakref.ref(state.model.vaes[0].mu.weight)]
        del state, terms
        assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()
