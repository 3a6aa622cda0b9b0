"""Batches for all slots, from features on the device or, if they do not fit there, in host memory.

Row order is a pure function of (seed, epoch, pass, modality), and noise of (seed, step), so the loader's state is
(epoch, step): there is no iterator to save. Legend: r slots, m modalities, b rows.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from modis_dist.data.store.index import Strings
from modis_dist.distributed import ALONE, World
from modis_dist.objective import Batch
from modis_dist.train.placement import gather_to_device, storage_device
from modis_dist.train.prepare import Prepared
from modis_dist.train.seeds import generator, mix

EpochLength = Literal["shortest", "longest"]


def steps_per_epoch(rows: Mapping[str, int], *, batch_size: int, epoch_length: EpochLength) -> int:
    """Return the number of whole batches in the shortest or longest modality, but at least 1."""
    counts = rows.values()
    return max(1, (min(counts) if epoch_length == "shortest" else max(counts)) // batch_size)


def labelled_rows(labelled: int, rows: int, *, batch_size: int, fraction: float) -> int:
    """Return the number of labelled rows per batch if they are oversampled; 0 if ``fraction`` is reached without."""
    return min(round(fraction * batch_size), batch_size - 1) if 0 < labelled < fraction * rows else 0


def row_order(rows: int, count: int, *, seed: int, epoch: int, modality: str) -> Tensor:
    """Return the positions [count] of the rows that an epoch visits: permutations of all rows, concatenated."""
    passes = -(-count // rows)
    orders = [
        torch.randperm(rows, generator=generator(seed, "order", epoch, number, modality)) for number in range(passes)
    ]
    return torch.cat(orders)[:count]


def epoch_order(
    label: Tensor, *, steps: int, batch_size: int, fraction: float, seed: int, epoch: int, modality: str
) -> Tensor:
    """Return the positions [steps * b] of the rows that an epoch visits in one modality, batch after batch.

    If less than ``fraction`` of the rows are labelled (``label`` [n] >= 0), labelled rows are oversampled: they are the
    first ``fraction`` of every batch, and unlabelled rows the rest. Such two-stream batches are common in
    semi-supervised learning (Tarvainen and Valpola 2017), because a few labels seen once per epoch carry too little
    weight.
    """
    labelled = torch.nonzero(label >= 0).squeeze(1)
    oversampled = labelled_rows(len(labelled), len(label), batch_size=batch_size, fraction=fraction)
    if not oversampled:
        return row_order(len(label), steps * batch_size, seed=seed, epoch=epoch, modality=modality)
    unlabelled = torch.nonzero(label < 0).squeeze(1)
    streams = []
    for rows, count, name in (
        (labelled, oversampled, "labelled"),
        (unlabelled, batch_size - oversampled, "unlabelled"),
    ):
        order = row_order(len(rows), steps * count, seed=mix(seed, name), epoch=epoch, modality=modality)
        streams.append(rows[order].view(steps, count))
    return torch.cat(streams, 1).flatten()


def sample_codes(sample_id: Mapping[str, Strings]) -> dict[str, Tensor]:
    """Return integer codes [n] by modality; rows of the same sample have the same code in all modalities."""
    codes: dict[str, int] = {}
    return {
        m: torch.tensor([codes.setdefault(name, len(codes)) for name in ids], dtype=torch.long)
        for m, ids in sample_id.items()
    }


class Loader:
    """Gathers the batches of R slots; slots with the same ``Prepared`` share one copy of the data."""

    def __init__(
        self,
        prepared: Sequence[Prepared],
        seeds: Sequence[int],
        *,
        batch_size: int,
        epoch_length: EpochLength,
        min_labelled_fraction: float,
        latent: int,
        signs: bool,
        device: torch.device,
        dtype: torch.dtype,
        world: World = ALONE,
    ) -> None:
        self._world = world
        self._seeds = list(seeds)
        self._batch_size = batch_size
        self._min_labelled_fraction = min_labelled_fraction
        self._latent = latent
        self._signs = signs
        self._device = device
        self._dtype = dtype
        self.modalities = tuple(prepared[0].train.x)
        rows = [p.train.rows() for p in prepared]
        self._labels = [{m: torch.as_tensor(label) for m, label in p.train.label.items()} for p in prepared]
        distinct = {id(p): p for p in prepared}
        samples = {name: sample_codes(p.train.sample_id) for name, p in distinct.items()}
        self._samples = [samples[id(p)] for p in prepared]
        values = sum(x.size for p in distinct.values() for x in p.train.x.values())
        self._storage_device = storage_device(values * dtype.itemsize, device)
        features = {name: _stored(p, self._storage_device, device, dtype) for name, p in distinct.items()}
        self._x = [features[id(p)] for p in prepared]
        self._run_lengths = [len(list(run)) for _, run in groupby(map(id, prepared))]  # of slots that share data
        lengths = {steps_per_epoch(counts, batch_size=batch_size, epoch_length=epoch_length) for counts in rows}
        assert len(lengths) == 1, "slots of one stack have the same number of steps per epoch"
        self.steps = lengths.pop()
        self._plan: tuple[int, Tensor, Tensor, Tensor] | None = None

    def batch(self, *, epoch: int, step: int) -> Batch:
        """Return the batch of a step of an epoch, both counted from 0, with the features of this rank's rows only."""
        positions = slice(step * self._batch_size, (step + 1) * self._batch_size)
        rows, label, sample = (plan[:, :, positions] for plan in self._plan_of(epoch))
        blocks = [self._world.block(m, self._batch_size) for m in range(len(self.modalities))]
        x = tuple(self._gather(rows[:, m, block], m) for m, block in enumerate(blocks))
        noise_d, noise_g, signs = self._noise(epoch * self.steps + step)
        return Batch(x, label.contiguous(), sample.contiguous(), noise_d, noise_g, signs)

    def _gather(self, rows: Tensor, modality: int) -> Tensor:
        """Return the features of rows [r, b]; on the device, adjacent slots that share data take a single gather."""
        features = [x[modality] for x in self._x]
        if self._storage_device != self._device:
            return gather_to_device(features, rows, device=self._device).to(self._dtype)
        parts, start = [], 0
        for count in self._run_lengths:
            parts.append(features[start][rows[start : start + count]])
            start += count
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _plan_of(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return positions (on the storage device), labels and sample codes of an epoch, each [r, m, steps * b]."""
        if self._plan is None or self._plan[0] != epoch:
            order = torch.stack([self._order(r, epoch) for r in range(len(self._seeds))])
            label, sample = (self._in_order(values, order).to(self._device) for values in (self._labels, self._samples))
            self._plan = (epoch, order.to(self._storage_device), label, sample)
        return self._plan[1:]

    def _in_order(self, values: Sequence[Mapping[str, Tensor]], order: Tensor) -> Tensor:
        """Return the values of each slot and modality in the given row order, [r, m, steps * b]."""
        return torch.stack(
            [
                torch.stack([slot_values[m][rows] for m, rows in zip(self.modalities, orders, strict=True)])
                for slot_values, orders in zip(values, order, strict=True)
            ]
        )

    def _order(self, slot: int, epoch: int) -> Tensor:
        """Return the positions [m, steps * b] of the rows of one slot."""
        orders = [
            epoch_order(
                self._labels[slot][m],
                steps=self.steps,
                batch_size=self._batch_size,
                fraction=self._min_labelled_fraction,
                seed=self._seeds[slot],
                epoch=epoch,
                modality=m,
            )
            for m in self.modalities
        ]
        return torch.stack(orders)

    def _noise(self, step: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return standard normal noise [r, m, b, l] for both phases, and random signs [r, m, b, m] if needed."""
        modalities = len(self.modalities)
        size = (2, modalities, self._batch_size, self._latent)
        noise, signs = [], []
        for seed in self._seeds:
            rng = torch.Generator(device=self._device).manual_seed(mix(seed, "noise", step))
            noise.append(torch.randn(size, generator=rng, device=self._device))
            if self._signs:
                shape = (modalities, self._batch_size, modalities)
                signs.append(torch.randint(0, 2, shape, generator=rng, device=self._device) * 2 - 1)
        noise_d, noise_g = torch.stack(noise, 1).to(self._dtype)
        return noise_d, noise_g, torch.stack(signs).to(self._dtype) if signs else None


def _stored(prepared: Prepared, storage: torch.device, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the features on the storage device; on the host, they are not copied."""
    target = dtype if storage == device else None
    return tuple(torch.as_tensor(part).to(storage, target) for part in prepared.train.x.values())
