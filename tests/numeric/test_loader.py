"""Row order, batches and noise of the loader."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modis_dist.objective import Batch
from modis_dist.train.loader import EpochLength, Loader, epoch_order, labelled_rows, row_order, steps_per_epoch
from modis_dist.train.prepare import Prepared
from modis_dist.train.seeds import generator, mix
from tests.numeric.toy_system import SHAPE, few, loader, prepared

UNEVEN = {"a": 320, "b": 64, "c": 64}


def numbers(batch: Batch, modality: int, slot: int = 0) -> list[int]:
    """Return the row numbers in a batch: the first feature of the toy data is the row number."""
    return batch.x[modality][slot, :, 0].int().tolist()


def epoch_of(batches: Loader, epoch: int, modality: int, slot: int = 0) -> list[int]:
    return [n for at in range(batches.steps) for n in numbers(batches.batch(epoch=epoch, step=at), modality, slot)]


# --- order --------------------------------------------------------------------------------------------------


@few
@given(st.integers(1, 50), st.integers(0, 2**63 - 1), st.integers(0, 1000), st.sampled_from(["a", "ä\x1f", ""]))
def test_row_order_is_a_permutation_and_a_pure_function(rows: int, seed: int, epoch: int, modality: str) -> None:
    torch.manual_seed(0)
    order = row_order(rows, rows, seed=seed, epoch=epoch, modality=modality)
    assert sorted(order.tolist()) == list(range(rows))
    torch.manual_seed(1)
    assert torch.equal(order, row_order(rows, rows, seed=seed, epoch=epoch, modality=modality))


@few
@given(st.integers(1, 20), st.integers(1, 100))
def test_no_row_repeats_before_all_others_were_drawn(rows: int, drawn: int) -> None:
    counts = Counter(row_order(rows, drawn, seed=1, epoch=2, modality="a").tolist())
    assert sum(counts.values()) == drawn
    assert max(counts.values()) - min(counts.get(n, 0) for n in range(rows)) <= 1


def test_row_order_differs_between_seeds_epochs_modalities_and_passes() -> None:
    one = {"seed": 1, "epoch": 2, "modality": "a"}
    others = [one, one | {"seed": 2}, one | {"epoch": 1}, one | {"modality": "b"}]
    orders = [tuple(row_order(30, 30, **where).tolist()) for where in others]
    twice = row_order(30, 60, **one)
    orders.append(tuple(twice[30:].tolist()))
    assert tuple(twice[:30].tolist()) == orders[0], "the first pass depends on the number of passes"
    assert len(set(orders)) == 5


def test_nothing_is_drawn_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    loader([prepared(UNEVEN)], [1], signs=True).batch(epoch=0, step=0)
    assert torch.equal(before, torch.get_rng_state())


@few
@given(
    st.lists(st.one_of(st.integers(), st.text(max_size=4)), max_size=4),
    st.lists(st.one_of(st.integers(), st.text(max_size=4)), max_size=4),
)
def test_seeds_of_different_parts_differ(one: list[int | str], other: list[int | str]) -> None:
    assert (mix(*one) == mix(*other)) == (one == other)
    assert 0 <= mix(*one) < 2**63


def test_seeds_depend_on_type_order_and_boundaries_of_their_parts() -> None:
    parts = [(1, 2), (2, 1), ("1", 2), (12,), ("12",), ("1", "2"), ("1\x1fstr:2",), ("1', '2",), ()]
    assert len({mix(*p) for p in parts}) == len(parts)
    assert torch.equal(torch.rand(3, generator=generator(1, "x")), torch.rand(3, generator=generator(1, "x")))


def test_seeds_equal_stored_values() -> None:
    assert mix(0, "weights") == 5_087_778_715_007_104_936
    assert mix(7, "order", 3, 0, "mrna") == 7_696_075_937_775_606_105


# --- samples ------------------------------------------------------------------------------------------------


def test_rows_have_equal_codes_if_and_only_if_they_belong_to_one_sample() -> None:
    data = prepared(UNEVEN)
    shared = {m: np.array([f"s{i}" if i % 3 else f"{m}{i}" for i in range(n)], object) for m, n in UNEVEN.items()}
    data = replace(data, train=replace(data.train, sample_id=shared))
    batches = loader([data, data], [1, 2])
    codes: dict[int, str] = {}
    for at in range(batches.steps):
        batch = batches.batch(epoch=0, step=at)
        assert batch.sample.dtype == torch.long and batch.sample.shape == batch.label.shape
        for r, m in np.ndindex(2, 3):
            ids = shared[batches.modalities[m]][numbers(batch, m, r)]
            for code, name in zip(batch.sample[r, m].tolist(), ids, strict=True):
                assert codes.setdefault(code, name) == name
    assert len(set(codes.values())) == len(codes) > 100


# --- labelled rows ------------------------------------------------------------------------------------------


def hidden(data: Prepared, *, keep: int) -> Prepared:
    """Return the same data with labels on the last ``keep`` rows only."""
    label = {m: np.where(np.arange(len(y)) >= len(y) - keep, y, -1) for m, y in data.train.label.items()}
    return replace(data, train=replace(data.train, label=label))


def test_few_labelled_rows_are_oversampled_equally_often_to_fill_their_fraction_of_every_batch() -> None:
    batches = loader([hidden(prepared(dict.fromkeys(UNEVEN, 320)), keep=5)], [3], fraction=0.25)
    for m in range(3):
        visits: Counter[int] = Counter()
        for at in range(batches.steps):
            batch = batches.batch(epoch=0, step=at)
            assert (batch.label[0, m] >= 0).sum() == 8 == 0.25 * 32
            rows = numbers(batch, m)
            assert len(set(rows) - set(range(315, 320))) == 24, "an unlabelled row repeats"
            visits.update(rows)
        assert [visits[n] for n in range(315, 320)] == [8 * batches.steps // 5] * 5
        assert set(visits.values()) <= {1, 16} and len(visits) == 24 * batches.steps + 5


@pytest.mark.parametrize(("keep", "fraction"), [(0, 0.25), (80, 0.25), (320, 0.9), (5, 0.0)])
def test_batches_are_unchanged_if_no_row_or_enough_rows_are_labelled(keep: int, fraction: float) -> None:
    rows = dict.fromkeys(UNEVEN, 320)
    asked, plain = (loader([hidden(prepared(rows), keep=keep)], [3], fraction=s) for s in (fraction, 0.0))
    for m in range(3):
        assert epoch_of(asked, 2, m) == epoch_of(plain, 2, m)
        assert sorted(epoch_of(asked, 2, m)) == list(range(320))


def test_the_labelled_fraction_is_applied_per_modality_and_member() -> None:
    few_labels, many = prepared({"a": 320, "b": 64, "c": 64}), prepared({"a": 320, "b": 64, "c": 64}, seed=1)
    sets = [hidden(few_labels, keep=15), many]  # 15 of 64 is below a quarter, as is 15 of 320
    stack = loader(sets, [4, 4], fraction=0.25)
    assert epoch_of(stack, 1, 1, slot=1) == epoch_of(loader([many], [4]), 1, 1)
    assert [epoch_of(stack, 1, m) for m in range(3)] == [
        epoch_of(loader(sets[:1], [4], fraction=0.25), 1, m) for m in range(3)
    ]
    assert all((stack.batch(epoch=1, step=1).label[0] >= 0).sum(1) == 8)


@few
@given(st.integers(2, 9), st.floats(0, 0.999), st.integers(1, 9), st.integers(0, 9))
def test_any_labelled_fraction_fills_the_batch_with_at_least_one_unlabelled_row(
    size: int, fraction: float, known: int, others: int
) -> None:
    label = torch.tensor([0] * known + [-1] * others)
    where = {"seed": 0, "epoch": 0, "modality": "a"}
    order = epoch_order(label, steps=3, batch_size=size, fraction=fraction, **where)
    assert order.shape == (3 * size,) and order.min() >= 0 and order.max() < known + others
    assert torch.equal(order, epoch_order(label, steps=3, batch_size=size, fraction=fraction, **where))
    assert others == 0 or labelled_rows(known, known + others, batch_size=size, fraction=fraction) < size


# --- epochs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "shortest", "longest"),
    [
        (UNEVEN, 2, 10),
        ({"a": 65, "b": 95, "c": 97}, 2, 3),
        ({"a": 5, "b": 40, "c": 7}, 1, 1),
        ({"a": 2, "b": 3, "c": 31}, 1, 1),
    ],
)
def test_steps_are_whole_batches_of_the_shortest_or_longest_modality_and_at_least_one(
    rows: dict[str, int], shortest: int, longest: int
) -> None:
    assert steps_per_epoch(rows, batch_size=32, epoch_length="shortest") == shortest
    assert steps_per_epoch(rows, batch_size=32, epoch_length="longest") == longest


def test_a_longest_epoch_visits_every_row_and_rows_of_shorter_modalities_equally_often() -> None:
    batches = loader([prepared(UNEVEN)], [3], ends="longest")
    assert batches.steps == 10
    assert sorted(epoch_of(batches, 0, 0)) == list(range(320))
    assert Counter(epoch_of(batches, 0, 1)) == Counter(dict.fromkeys(range(64), 5))


def test_shortest_epochs_eventually_visit_every_row_of_the_longer_modality() -> None:
    batches = loader([prepared(UNEVEN)], [3])
    assert batches.steps == 2
    first = epoch_of(batches, 0, 0)
    assert len(set(first)) == 64
    assert sorted(epoch_of(batches, 0, 1)) == list(range(64))
    seen = set(first).union(*(epoch_of(batches, epoch, 0) for epoch in range(1, 60)))
    assert seen == set(range(320)), "each epoch shows a random fifth; a row is missed by 60 of them once in 650,000"


@pytest.mark.parametrize("ends", ["shortest", "longest"])
def test_fewer_rows_than_a_batch_are_repeated_to_fill_it(ends: EpochLength) -> None:
    batches = loader([prepared({"a": 5, "b": 40, "c": 2})], [1], ends=ends)
    batch = batches.batch(epoch=0, step=0)
    assert batches.steps == 1
    assert [x.shape[1] for x in batch.x] == [32, 32, 32]
    assert sorted(Counter(numbers(batch, 0)).values()) == [6, 6, 6, 7, 7]
    assert Counter(numbers(batch, 2)) == {0: 16, 1: 16}


# --- batches ------------------------------------------------------------------------------------------------


def test_features_and_labels_of_a_batch_belong_to_the_same_training_row() -> None:
    data = prepared({"a": 100, "b": 90, "c": 80}, seed=1)
    batches = loader([data, data], [5, 6], batch_size=16)
    batch = batches.batch(epoch=1, step=2)
    for r in range(2):
        for m, name in enumerate(batches.modalities):
            rows = numbers(batch, m, r)
            expected = torch.as_tensor(data.train.x[name][rows]).double()
            assert torch.equal(batch.x[m][r], expected)
            assert batch.label[r, m].tolist() == data.train.label[name][rows].tolist()
    assert numbers(batch, 0, 0) != numbers(batch, 0, 1)


def test_a_batch_depends_only_on_epoch_and_step() -> None:
    batches = loader([prepared(UNEVEN)], [3], signs=True)
    drawn = batches.batch(epoch=4, step=1)
    batches.batch(epoch=7, step=0)
    for again in (batches.batch(epoch=4, step=1), loader([prepared(UNEVEN)], [3], signs=True).batch(epoch=4, step=1)):
        assert all(torch.equal(one, other) for one, other in zip(drawn.x, again.x, strict=True))
        for name in ("label", "noise_d", "noise_g", "signs"):
            assert torch.equal(getattr(drawn, name), getattr(again, name))


def test_the_batch_of_a_slot_is_the_same_alone_and_in_a_stack() -> None:
    drawn = [prepared({"a": 70, "b": 64 + n, "c": 90 - n}, seed=n) for n in range(3)]
    sets, seeds = [drawn[n] for n in (0, 1, 1, 2, 0)], [9, 8, 9, 7, 6]
    stack = loader(sets, seeds, signs=True).batch(epoch=3, step=1)
    for r, seed in enumerate(seeds):
        alone = loader([sets[r]], [seed], signs=True).batch(epoch=3, step=1)
        assert all(torch.equal(many[r], one[0]) for many, one in zip(stack.x, alone.x, strict=True))
        for name in ("label", "noise_d", "noise_g", "signs"):
            assert torch.equal(getattr(stack, name)[r], getattr(alone, name)[0])
    assert torch.equal(stack.noise_d[0], stack.noise_d[2]), "noise does not depend on the seed"
    assert not torch.equal(stack.noise_d[0], stack.noise_d[1])


def test_noise_is_standard_normal_and_differs_in_every_phase_and_step() -> None:
    batches = loader([prepared(dict.fromkeys(SHAPE.features, 1024))], [3], batch_size=512, signs=True)
    draws = [noise for at in range(2) for b in [batches.batch(epoch=0, step=at)] for noise in (b.noise_d, b.noise_g)]
    draws.append(batches.batch(epoch=1, step=0).noise_d)
    flat = torch.stack([noise.flatten() for noise in draws])
    assert (torch.corrcoef(flat) - torch.eye(5)).abs().max() < 0.05
    assert flat.mean(1).abs().max() < 0.05
    assert (flat.std(1) - 1).abs().max() < 0.05
    signs = batches.batch(epoch=0, step=0).signs
    assert signs is not None
    assert signs.shape == (1, 3, 512, 3)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert signs.mean().abs() < 0.06


def test_signs_are_drawn_only_on_request_and_do_not_change_the_noise() -> None:
    without, drawn = (loader([prepared(UNEVEN)], [3], signs=s).batch(epoch=0, step=0) for s in (False, True))
    assert without.signs is None
    assert torch.equal(without.noise_d, drawn.noise_d)
    assert torch.equal(without.noise_g, drawn.noise_g)


def test_slots_with_the_same_prepared_data_share_its_memory() -> None:
    one, other = prepared(UNEVEN), prepared(UNEVEN)
    batches = loader([one, one, other], [1, 2, 3])
    first, second, third = ([x.data_ptr() for x in data] for data in batches._x)
    assert first == second
    assert set(first).isdisjoint(third)


def test_slots_with_different_epoch_lengths_are_refused() -> None:
    with pytest.raises(AssertionError, match="steps per epoch"):
        loader([prepared(UNEVEN), prepared(dict.fromkeys(UNEVEN, 32))], [1, 2])
