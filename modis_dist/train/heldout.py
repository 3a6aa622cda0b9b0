"""Validation of a stack: class predictions from mu and reconstruction errors of rows that took no part in training."""

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from modis_dist.losses.vae import squared_error
from modis_dist.model.networks import Modis
from modis_dist.train.metrics import Scored, classification, headline
from modis_dist.train.prepare import Prepared, Subset
from modis_dist.world import ALONE, World

ROWS_AT_ONCE = 2048


class HeldOut:
    """Validation rows of R replicates on the device, padded to one length; one copy where all have the same rows.

    Each rank looks at a block of the rows.
    """

    def __init__(
        self, prepared: Sequence[Prepared], *, device: torch.device, dtype: torch.dtype, world: World = ALONE
    ) -> None:
        self._world = world
        self._classes = prepared[0].classes
        self._subsets: list[Subset] = []
        for one in prepared:
            assert one.validation is not None, "validation needs validation rows"
            self._subsets.append(one.validation)
        self._x = {m: self._padded(m, device, dtype) for m in prepared[0].train.x}

    def _padded(self, modality: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        longest = max(len(subset.x[modality]) for subset in self._subsets)
        block = self._world.block(0, longest)
        if all(subset is self._subsets[0] for subset in self._subsets):
            shared = torch.as_tensor(self._subsets[0].x[modality][block]).to(device, dtype)
            return shared.expand(len(self._subsets), *shared.shape)
        parts = [torch.as_tensor(subset.x[modality]) for subset in self._subsets]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)[:, block].to(device, dtype)

    def validate(self, model: Modis) -> list[dict[str, float]]:
        """For each replicate ``balanced_accuracy`` and the like, and ``reconstruction_mse`` overall and by modality.

        A figure that is undefined or not finite is left out, and so is an overall error that one enters. The same on
        every rank.
        """
        model.eval()
        predicted: list[dict[str, Scored]] = [{} for _ in self._subsets]
        errors: list[dict[str, float]] = [{} for _ in self._subsets]
        for modality, x in self._x.items():
            label, error = self._of_all_ranks(_forward(model, modality, x), modality)
            for r, subset in enumerate(self._subsets):
                n = len(subset.x[modality])
                predicted[r][modality] = Scored(subset.label[modality], label[r, :n].numpy())
                if n:
                    errors[r][modality] = float(error[r, :n].double().mean())
        model.train()
        each = list(zip(predicted, errors, strict=True))
        return self._world.agreed(lambda: [self._figures(scored, error) for scored, error in each])

    def _of_all_ranks(self, own: tuple[Tensor, Tensor], modality: str) -> tuple[Tensor, Tensor]:
        """Predicted classes and errors [r, n] of all rows, on the host."""
        longest = max(len(subset.x[modality]) for subset in self._subsets)
        both = torch.stack(own, -1)  # classes as floating-point numbers: small whole numbers are exact
        (found,) = self._world.whole([both], 1, longest)
        label, error = found.squeeze(1).cpu().unbind(-1)
        return label.long(), error

    def _figures(self, scored: dict[str, Scored], errors: dict[str, float]) -> dict[str, float]:
        values = headline(classification(scored, classes=self._classes))
        values |= {f"reconstruction_mse/{modality}": error for modality, error in errors.items()}
        values["reconstruction_mse"] = sum(errors.values()) / max(len(errors), 1)
        return {name: value for name, value in values.items() if isfinite(value)}


@torch.no_grad()
def _forward(model: Modis, modality: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Predicted classes and squared reconstruction errors of this rank's rows, each [r, n] and double."""
    vae = model.vae(modality)
    label, error = [], []
    for rows in torch.split(x, ROWS_AT_ONCE, 1):
        mu, _ = vae.encode(rows)
        label.append(model.discriminator(mu).label.argmax(-1))
        error.append(squared_error(rows, vae.decode(mu)))
    return torch.cat(label, 1).double(), torch.cat(error, 1).double()
