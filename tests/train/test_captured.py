"""A recorded step, on a stand-in for a GPU's recorder: what it is given, and when it is recorded anew."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from modis_dist.objective import Batch, Rules, Terms, Weights
from modis_dist.train.captured import WARM_UP, Captured, Recording
from tests.numeric.toy_system import batch, weights


class Recorder:
    """Runs a step again where a GPU would replay it: on the same tensors, into the same terms."""

    def __init__(self) -> None:
        self.recorded, self.replayed = 0, 0

    def __call__(self, step: Callable[[], Terms]) -> Recording:
        self.recorded += 1
        terms = Terms(torch.zeros(1))

        def run() -> None:
            self.replayed += 1
            terms.parts = step().parts

        return run, terms


def sums(given: Batch, _: Weights, __: Rules) -> Terms:
    """Terms that tell every tensor of a batch."""
    held = [*given.x, given.label, given.noise_d, given.noise_g, *([] if given.signs is None else [given.signs])]
    return Terms(torch.zeros(1), parts={str(n): tensor.sum() for n, tensor in enumerate(held)})


def same(found: Terms, given: Batch) -> bool:
    expected: dict[str, Tensor] = sums(given, weights(), Rules()).parts
    return found.parts.keys() == expected.keys() and all(
        torch.equal(found.parts[name], expected[name]) for name in expected
    )


def test_every_step_is_given_its_own_batch_before_and_after_it_is_recorded() -> None:
    recorder, how, rules = Recorder(), weights(), Rules()
    step = Captured(sums, record=recorder)
    for number in range(WARM_UP + 3):
        given = batch(number, signs=True)
        assert same(step(given, how, rules), given), number
    assert (recorder.recorded, recorder.replayed) == (1, 3)


def test_a_batch_that_was_given_is_never_written_to() -> None:
    step, how, rules = Captured(sums, record=Recorder()), weights(), Rules()
    first = batch(1)
    held = [x.clone() for x in first.x]
    for number in (1, 1, 1, 1, 2):
        step(first if number == 1 else batch(number), how, rules)
    assert all(torch.equal(x, before) for x, before in zip(first.x, held, strict=True))


def test_other_sizes_weights_or_rules_are_recorded_anew_after_warming_up() -> None:
    recorder, how, rules = Recorder(), weights(), Rules()
    step = Captured(sums, record=recorder)

    def recordings_after(given: Batch, how: Weights, rules: Rules) -> int:
        for _ in range(WARM_UP + 1):
            assert same(step(given, how, rules), given)
        return recorder.recorded

    assert recordings_after(batch(1), how, rules) == 1
    assert recordings_after(batch(1), how, rules) == 1
    assert recordings_after(batch(1), replace(how), rules) == 2
    assert recordings_after(batch(1), how, Rules(kl_reduction="mean")) == 3
    assert recordings_after(batch(1, replicates=2), how, rules) == 4
