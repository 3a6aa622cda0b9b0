"""Losses of twenty steps equal stored ones; see `tools/golden.py` on when these may change."""

import json
from itertools import combinations
from math import log

import pytest

from tests.numeric import golden_runs
from tests.numeric.toy_system import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_equal_the_stored_ones(kind: str) -> None:
    stored = json.loads(golden_runs.path(kind).read_text(encoding="utf-8"))
    steps = golden_runs.run(kind)
    assert len(steps) == len(stored) == golden_runs.STEPS
    for number, (step, expected) in enumerate(zip(steps, stored, strict=True)):
        assert step == pytest.approx(expected, rel=1e-9, abs=1e-12), f"step {number}"


def test_golden_runs_differ_between_losses() -> None:
    runs = {kind: json.loads(golden_runs.path(kind).read_text(encoding="utf-8")) for kind in KINDS}
    assert all(runs[kind] != runs[other] for kind, other in combinations(KINDS, 2))
    assert all(row["adversarial_g"] == pytest.approx(log(2), rel=1e-11) for row in runs["published"])
