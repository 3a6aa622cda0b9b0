"""Batches of every replicate, from data that stay on the device.

The order of rows is a pure function of (seed, epoch, pass, modality) and noise one of (seed, step), so the loader's
place is just (epoch, step): there is no iterator to save. Legend: r replicates, m modalities, b rows.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from modis_dist.objective import Batch
from modis_dist.train.prepare import Prepared
from modis_dist.train.seeds import generator, mix

EpochEnds = Literal["shortest", "longest"]


def steps_per_epoch(rows: Mapping[str, int], *, batch_size: int, epoch_ends: EpochEnds) -> int:
    """Steps until the shortest or longest modality is used up, its last incomplete batch dropped; at least 1."""
    counts = rows.values()
    return max(1, (min(counts) if epoch_ends == "shortest" else max(counts)) // batch_size)


def row_order(rows: int, wanted: int, *, seed: int, epoch: int, modality: str) -> Tensor:
    """Positions of the rows an epoch visits: permutations one after the other, each row once per permutation."""
    passes = -(-wanted // rows)
    drawn = [
        torch.randperm(rows, generator=generator(seed, "order", epoch, number, modality)) for number in range(passes)
    ]
    return torch.cat(drawn)[:wanted]


class Loader:
    """Gathers the batches of R replicates; replicates with the same ``Prepared`` share one copy of the data."""

    def __init__(
        self,
        prepared: Sequence[Prepared],
        seeds: Sequence[int],
        *,
        batch_size: int,
        epoch_ends: EpochEnds,
        latent: int,
        signs: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._seeds = list(seeds)
        self._batch_size = batch_size
        self._latent = latent
        self._signs = signs
        self._device = device
        self._dtype = dtype
        self.modalities = tuple(prepared[0].train.x)
        self._rows = [p.train.rows() for p in prepared]
        held = {id(p): _on_device(p, device, dtype) for p in prepared}
        self._data = [held[id(p)] for p in prepared]
        lengths = {steps_per_epoch(rows, batch_size=batch_size, epoch_ends=epoch_ends) for rows in self._rows}
        assert len(lengths) == 1, "replicates of one stack have the same number of steps per epoch"
        self.steps = lengths.pop()
        self._plan: tuple[int, Tensor] | None = None

    def batch(self, *, epoch: int, step: int) -> Batch:
        """The batch at a step of an epoch, both counted from 0."""
        rows = self._plan_of(epoch)[:, :, step * self._batch_size : (step + 1) * self._batch_size]
        x = tuple(self._gather(rows[:, m], m) for m in range(len(self.modalities)))
        label = torch.stack(
            [
                torch.stack([labels[m][rows[r, m]] for m in range(len(self.modalities))])
                for r, (_, labels) in enumerate(self._data)
            ]
        )
        noise_d, noise_g, signs = self._noise(epoch * self.steps + step)
        return Batch(x, label, noise_d, noise_g, signs)

    def _gather(self, rows: Tensor, modality: int) -> Tensor:
        return torch.stack([x[modality][rows[r]] for r, (x, _) in enumerate(self._data)])

    def _plan_of(self, epoch: int) -> Tensor:
        """Row positions [r, m, steps * b] of an epoch."""
        if self._plan is None or self._plan[0] != epoch:
            wanted = self.steps * self._batch_size
            plan = torch.stack(
                [
                    torch.stack(
                        [row_order(rows[m], wanted, seed=seed, epoch=epoch, modality=m) for m in self.modalities]
                    )
                    for seed, rows in zip(self._seeds, self._rows, strict=True)
                ]
            )
            self._plan = (epoch, plan.to(self._device))
        return self._plan[1]

    def _noise(self, step: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Standard normal noise of both phases [r, m, b, l], and random signs [r, m, b, m] where asked for."""
        modalities = len(self.modalities)
        size = (2, modalities, self._batch_size, self._latent)
        noise, signs = [], []
        for seed in self._seeds:
            drawing = torch.Generator(device=self._device).manual_seed(mix(seed, "noise", step))
            noise.append(torch.randn(size, generator=drawing, device=self._device))
            if self._signs:
                shape = (modalities, self._batch_size, modalities)
                signs.append(torch.randint(0, 2, shape, generator=drawing, device=self._device) * 2 - 1)
        both = torch.stack(noise, 1).to(self._dtype)
        return both[0], both[1], torch.stack(signs).to(self._dtype) if signs else None


def _on_device(
    prepared: Prepared, device: torch.device, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    x = tuple(torch.as_tensor(part).to(device, dtype) for part in prepared.train.x.values())
    label = tuple(torch.as_tensor(part).to(device) for part in prepared.train.label.values())
    return x, label
