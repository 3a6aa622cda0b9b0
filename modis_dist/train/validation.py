"""Validation of a stack: class predictions from mu and reconstruction errors of rows that took no part in training."""

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
    """Validation rows of R replicates, one copy of those that are the same, padded to one length a part at a time.

    They stay on the device, or beside it where they do not fit. Each rank looks at a block of the rows.
    """

    def __init__(
        self, prepared: Sequence[Prepared], *, device: torch.device, dtype: torch.dtype, world: World = ALONE
    ) -> None:
        self._world = world
        self._device = device
        self._dtype = dtype
        self._classes = prepared[0].classes
        self._subsets: list[Subset] = []
        for one in prepared:
            assert one.validation is not None, "validation needs validation rows"
            self._subsets.append(one.validation)
        distinct = {id(subset): subset for subset in self._subsets}
        values = sum(x.size for subset in distinct.values() for x in subset.x.values())
        place = storage_device(values * dtype.itemsize, device)
        held = {name: self._placed(subset, place) for name, subset in distinct.items()}
        self._x = {m: [held[id(subset)][m] for subset in self._subsets] for m in prepared[0].train.x}

    def _placed(self, subset: Subset, place: torch.device) -> dict[str, Tensor]:
        """This rank's rows of a subset."""
        kind = self._dtype if place == self._device else None
        return {m: torch.as_tensor(x[self._block(m)]).to(place, kind) for m, x in subset.x.items()}

    def _block(self, modality: str) -> slice:
        """This rank's rows, of as many as the replicate with the most has."""
        return self._world.block(0, self._longest(modality))

    def _longest(self, modality: str) -> int:
        return max(len(subset.x[modality]) for subset in self._subsets)

    def _parts(self, modality: str) -> Iterator[Tensor]:
        """This rank's rows [r, n, p] on the device, so many at once as pass through the networks; at least one part."""
        parts = self._x[modality]
        longest, step = max(map(len, parts)), rows_at_once(parts[0].shape[1], most=ROWS_AT_ONCE)
        for start in range(0, max(longest, 1), step):
            if all(part is parts[0] for part in parts):
                one = parts[0][start : start + step].to(self._device, self._dtype)
                yield one.expand(len(parts), *one.shape)
            else:
                own = [part[start : start + step].to(self._device, self._dtype) for part in parts]
                yield torch.nn.utils.rnn.pad_sequence(own, batch_first=True)

    def validate(self, model: Modis) -> list[dict[str, float]]:
        """For each replicate ``balanced_accuracy`` and the like, and ``reconstruction_mse`` overall and by modality.

        A figure that is undefined or not finite is left out, and so is an overall error that one enters. The same on
        every rank.
        """
        model.eval()
        predicted: list[dict[str, ClassPredictions]] = [{} for _ in self._subsets]
        errors: list[dict[str, float]] = [{} for _ in self._subsets]
        for modality in self._x:
            label, error = self._of_all_ranks(_forward(model, modality, self._parts(modality)), modality)
            for r, subset in enumerate(self._subsets):
                n = len(subset.x[modality])
                predicted[r][modality] = ClassPredictions(subset.label[modality], label[r, :n].numpy())
                if n:
                    errors[r][modality] = float(error[r, :n].double().mean())
        model.train()
        each = list(zip(predicted, errors, strict=True))
        return self._world.agreed(lambda: [self._figures(scored, error) for scored, error in each])

    def _of_all_ranks(self, own: tuple[Tensor, Tensor], modality: str) -> tuple[Tensor, Tensor]:
        """Predicted classes and errors [r, n] of all rows, on the host."""
        both = torch.stack(own, -1)  # classes as floating-point numbers: small whole numbers are exact
        (found,) = self._world.whole([both], 1, self._longest(modality))
        label, error = found.squeeze(1).cpu().unbind(-1)
        return label.long(), error

    def _figures(self, scored: dict[str, ClassPredictions], errors: dict[str, float]) -> dict[str, float]:
        values = headline(classification(scored, classes=self._classes))
        values |= {f"reconstruction_mse/{modality}": error for modality, error in errors.items()}
        values["reconstruction_mse"] = sum(errors.values()) / max(len(errors), 1)
        return {name: value for name, value in values.items() if isfinite(value)}


@torch.no_grad()
def _forward(model: Modis, modality: str, parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Predicted classes and squared reconstruction errors of this rank's rows, each [r, n] and double."""
    vae = model.vae(modality)
    label, error = [], []
    for rows in parts:
        mu, _ = vae.encode(rows)
        label.append(model.discriminator(mu).label.argmax(-1))
        error.append(squared_error(rows, vae.decode(mu)))
    return torch.cat(label, 1).double(), torch.cat(error, 1).double()
