"""Validation of a stack: class predictions from mu, and reconstruction errors."""

from collections.abc import Iterable, Iterator, Sequence
from math import isfinite

import torch
from torch import Tensor

from modis_dist.distributed import ALONE, World
from modis_dist.losses.vae import squared_error
from modis_dist.metrics import ClassPredictions, classification, headline
from modis_dist.model.networks import Modis
from modis_dist.train.placement import rows_at_once, storage_device
from modis_dist.train.prepare import Prepared, Subset

ROWS_AT_ONCE = 2048


class ValidationRows:
    """Validation rows of R slots; slots with the same rows share one copy.

    They are stored on the device, or on the host if they do not fit there. Each rank validates a block of the rows.
    """

    def __init__(
        self, prepared: Sequence[Prepared], *, device: torch.device, dtype: torch.dtype, world: World = ALONE
    ) -> None:
        self._world = world
        self._device = device
        self._dtype = dtype
        self._classes = prepared[0].classes
        self._subsets: list[Subset] = []
        for part in prepared:
            assert part.validation is not None, "validation needs validation rows"
            self._subsets.append(part.validation)
        distinct = {id(subset): subset for subset in self._subsets}
        values = sum(x.size for subset in distinct.values() for x in subset.x.values())
        storage = storage_device(values * dtype.itemsize, device)
        features = {name: self._stored(subset, storage) for name, subset in distinct.items()}
        self._x = {m: [features[id(subset)][m] for subset in self._subsets] for m in prepared[0].train.x}

    def _stored(self, subset: Subset, storage: torch.device) -> dict[str, Tensor]:
        """Return this rank's rows of a subset."""
        dtype = self._dtype if storage == self._device else None
        blocks = {m: self._world.block(0, self._longest(m)) for m in subset.x}
        return {m: torch.as_tensor(x[blocks[m]]).to(storage, dtype) for m, x in subset.x.items()}

    def _longest(self, modality: str) -> int:
        return max(len(subset.x[modality]) for subset in self._subsets)

    def _parts(self, modality: str) -> Iterator[Tensor]:
        """Yield this rank's rows [r, n, p] on the device, padded, in parts that fit the networks; at least one part."""
        parts = self._x[modality]
        longest, step = max(map(len, parts)), rows_at_once(parts[0].shape[1], max_rows=ROWS_AT_ONCE)
        for start in range(0, max(longest, 1), step):
            if all(part is parts[0] for part in parts):
                shared = parts[0][start : start + step].to(self._device, self._dtype)
                yield shared.expand(len(parts), *shared.shape)
            else:
                rows = [part[start : start + step].to(self._device, self._dtype) for part in parts]
                yield torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def validate(self, model: Modis) -> list[dict[str, float]]:
        """Return the metrics of each slot: ``balanced_accuracy`` etc., ``reconstruction_mse`` overall and by modality.

        Errors are on the scale of the networks' input, log(1 + count) for counts. Metrics that are undefined or not
        finite are left out. The result is the same on every rank.
        """
        model.eval()
        predicted: list[dict[str, ClassPredictions]] = [{} for _ in self._subsets]
        errors: list[dict[str, float]] = [{} for _ in self._subsets]
        for modality in self._x:
            label, error = self._gathered(_forward(model, modality, self._parts(modality)), modality)
            for r, subset in enumerate(self._subsets):
                n = len(subset.x[modality])
                predicted[r][modality] = ClassPredictions(subset.label[modality], label[r, :n].numpy())
                if n:
                    errors[r][modality] = float(error[r, :n].double().mean())
        model.train()
        slots = list(zip(predicted, errors, strict=True))
        return self._world.broadcast(lambda: [self._metrics(scored, error) for scored, error in slots])

    def _gathered(self, rows: tuple[Tensor, Tensor], modality: str) -> tuple[Tensor, Tensor]:
        """Return predicted classes and errors [r, n] of all rows, on the host."""
        pairs = torch.stack(rows, -1)  # classes as floats, in which small integers are exact
        (gathered,) = self._world.gather([pairs], 1, self._longest(modality))
        label, error = gathered.squeeze(1).cpu().unbind(-1)
        return label.long(), error

    def _metrics(self, scored: dict[str, ClassPredictions], errors: dict[str, float]) -> dict[str, float]:
        values = headline(classification(scored, classes=self._classes))
        values |= {f"reconstruction_mse/{modality}": error for modality, error in errors.items()}
        values["reconstruction_mse"] = sum(errors.values()) / max(len(errors), 1)
        return {name: value for name, value in values.items() if isfinite(value)}


@torch.no_grad()
def _forward(model: Modis, modality: str, parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return predicted classes and squared reconstruction errors of this rank's rows, each [r, n] and double."""
    vae = model.vae(modality)
    label, error = [], []
    for rows in parts:
        mu, _ = vae.encode(rows)
        label.append(model.discriminator(mu).label.argmax(-1))
        error.append(squared_error(rows, vae.reconstruct(mu, vae.library_of(rows))))
    return torch.cat(label, 1).double(), torch.cat(error, 1).double()
