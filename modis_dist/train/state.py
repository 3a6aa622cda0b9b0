"""Everything a training changes: the stacked model, two optimisers, and each replicate's progress.

All tensors carry the replicates on their first axis, so that leaving a replicate out, saving, and loading are the same
operation on a dictionary of tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modis_dist.config.run import Optim
from modis_dist.model.layers import initialise
from modis_dist.model.networks import Modis, Shape
from modis_dist.train.checkpoint import Checkpoint, Tensors
from modis_dist.train.seeds import mix

Status = Literal["running", "done", "failed", "pruned"]


@dataclass
class Progress:
    """How far one replicate is, and its best validation so far; plain values, saved as JSON."""

    trial: str
    status: Status = "running"
    reason: str | None = None  # why it failed or was pruned
    best_value: float | None = None
    best_error: float | None = None  # reconstruction error of the same epoch, which decides between equals
    best_epoch: int | None = None  # epochs done when it was reached
    waited: int = 0  # validations since
    epochs: int = 0  # epochs done
    history: list[dict[str, float]] = field(default_factory=list)  # one row per epoch


class TrainState:
    """The replicates in training. ``members`` are positions in the list the training was started with."""

    def __init__(
        self, shape: Shape, members: Sequence[int], *, optim: Optim, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.shape = shape
        self.members = list(members)
        self.optim = optim
        self.model = Modis(shape, replicates=len(self.members), dtype=dtype).to(device)
        betas = (optim.beta1, optim.beta2)
        adversary_lr = optim.lr_discriminator or optim.lr
        self.vae_optimiser = torch.optim.Adam(self.model.vaes.parameters(), lr=optim.lr, betas=betas, fused=True)
        self.adversary_optimiser = torch.optim.Adam(
            self.model.discriminator.parameters(), lr=adversary_lr, betas=betas, fused=True
        )
        self.best: dict[str, Tensor] = {}  # model tensors of each replicate's best epoch
        self.epoch = 0
        self.step_in_epoch = 0
        self.updates = 0  # optimiser steps done

    @classmethod
    def start(
        cls, shape: Shape, seeds: Sequence[int], *, optim: Optim, device: torch.device, dtype: torch.dtype
    ) -> "TrainState":
        """A fresh state with initial weights drawn from each replicate's seed."""
        state = cls(shape, range(len(seeds)), optim=optim, device=device, dtype=dtype)
        initialise(state.model, [mix(seed, "weights") for seed in seeds])
        return state

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors by part; each has the replicates on its first axis."""
        parts = {"model": self.model_tensors(), "optim": self._moments()}
        return parts | ({"best": dict(self.best)} if self.best else {})

    def model_tensors(self) -> dict[str, Tensor]:
        """Parameters and running statistics."""
        return dict(self.model.state_dict())

    def load_tensors(self, parts: Mapping[str, Tensors]) -> None:
        """The inverse of ``tensors``; ``updates`` must be set before."""
        self.model.load_state_dict(dict(parts["model"]))
        for prefix, module, optimiser in self._optimised():
            for name, parameter in module.named_parameters():
                if f"{prefix}.{name}.first" in parts["optim"]:
                    optimiser.state[parameter] = {
                        "step": torch.tensor(float(self.updates), device=parameter.device),
                        "exp_avg": parts["optim"][f"{prefix}.{name}.first"].to(parameter, copy=True),
                        "exp_avg_sq": parts["optim"][f"{prefix}.{name}.second"].to(parameter, copy=True),
                    }
        device = next(self.model.parameters()).device
        self.best = {name: tensor.to(device, copy=True) for name, tensor in parts.get("best", {}).items()}

    def without(self, dropped: Sequence[int]) -> "TrainState":
        """A state of the replicates not in ``dropped`` (positions on the replicate axis)."""
        kept = [r for r in range(len(self.members)) if r not in dropped]
        first = next(self.model.parameters())
        members = [self.members[r] for r in kept]
        smaller = TrainState(self.shape, members, optim=self.optim, device=first.device, dtype=first.dtype)
        smaller.epoch, smaller.step_in_epoch, smaller.updates = self.epoch, self.step_in_epoch, self.updates
        smaller.load_tensors(
            {part: {name: t[kept] for name, t in tensors.items()} for part, tensors in self.tensors().items()}
        )
        return smaller

    def set_rates(self, share: float) -> None:
        """Learning rates of the next step, as a share of those the training began with."""
        for _, _, optimiser in self._optimised():
            for group in optimiser.param_groups:
                group["lr"] = share * optimiser.defaults["lr"]

    def keep_best(self, replicate: int) -> None:
        """Remember a replicate's present model as its best."""
        if not self.best:
            self.best = {name: tensor.clone() for name, tensor in self.model_tensors().items()}
            return
        for name, tensor in self.model_tensors().items():
            self.best[name][replicate] = tensor[replicate]

    def finite(self) -> list[bool]:
        """For each replicate whether all its parameters and statistics are finite."""
        checks = [t.flatten(1).isfinite().all(1) for t in self.model_tensors().values()]
        return [bool(ok) for ok in torch.stack(checks).all(0).cpu()]

    def checkpoint(
        self, *, identity: Mapping[str, Any], machine: Mapping[str, Any], progress: Sequence[Progress], sums: Any
    ) -> Checkpoint:
        """The state as it is saved.

        ``identity`` says what it belongs to, ``machine`` what it was computed with; ``sums`` are losses not averaged.
        """
        values = {
            "identity": dict(identity),
            "machine": dict(machine),
            "members": self.members,
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "updates": self.updates,
            "sums": sums,
            "progress": [asdict(p) for p in progress],
        }
        return Checkpoint(self.updates, self.tensors(), values)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint made with the same members."""
        self.epoch = checkpoint.state["epoch"]
        self.step_in_epoch = checkpoint.state["step_in_epoch"]
        self.updates = checkpoint.state["updates"]
        self.load_tensors(checkpoint.tensors)

    def _optimised(self) -> tuple[tuple[str, nn.Module, torch.optim.Optimizer], ...]:
        return (
            ("vaes", self.model.vaes, self.vae_optimiser),
            ("discriminator", self.model.discriminator, self.adversary_optimiser),
        )

    def _moments(self) -> dict[str, Tensor]:
        found = {}
        for prefix, module, optimiser in self._optimised():
            for name, parameter in module.named_parameters():
                if parameter in optimiser.state:
                    found[f"{prefix}.{name}.first"] = optimiser.state[parameter]["exp_avg"]
                    found[f"{prefix}.{name}.second"] = optimiser.state[parameter]["exp_avg_sq"]
        return found
