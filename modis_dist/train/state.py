"""Mutable state of a training: the stacked model and its two learners.

All tensors have the slots on their first axis, so dropping a slot, saving and loading are operations on dictionaries
of tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modis_dist.config.run import Optim
from modis_dist.distributed import ALONE, World
from modis_dist.model.layers import initialise
from modis_dist.model.networks import Modis, Shape
from modis_dist.objective import adversary_phase, vae_phase
from modis_dist.train.checkpoint import Checkpoint, Tensors
from modis_dist.train.cuda_graph import Inputs
from modis_dist.train.learner import Learner
from modis_dist.train.progress import Progress
from modis_dist.train.seeds import mix


@dataclass(frozen=True)
class Setup:
    """Settings that all states of a training share: device, precision, optimisers."""

    optim: Optim
    device: torch.device
    dtype: torch.dtype = torch.float32
    world: World = ALONE
    scaled: bool = False  # scale the losses, for fp16


class TrainState:
    """State of the slots in training; ``members`` are their positions in the list that the training started with."""

    def __init__(self, shape: Shape, members: Sequence[int], setup: Setup) -> None:
        self.shape = shape
        self.members = list(members)
        self.setup = setup
        model = Modis(shape, slots=len(self.members), dtype=setup.dtype, world=setup.world).to(setup.device)
        optim = setup.optim
        adversary_lr = optim.lr_discriminator or optim.lr
        self.model = model
        learner = partial(Learner, model=model, optim=optim, scaled=setup.scaled, inputs=Inputs())
        self.adversary = learner(adversary_phase, networks=model.discriminator, lr=adversary_lr)
        self.vaes = learner(vae_phase, networks=model.vaes, lr=optim.lr)
        self.best: dict[str, Tensor] = {}  # model tensors of each slot's best epoch
        self.epoch = 0
        self.step_in_epoch = 0
        self.updates = 0  # steps done

    @classmethod
    def start(cls, shape: Shape, seeds: Sequence[int], setup: Setup) -> "TrainState":
        """Return a new state, with initial weights drawn from each slot's seed."""
        state = cls(shape, range(len(seeds)), setup)
        initialise(state.model, [mix(seed, "weights") for seed in seeds])
        return state

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return all tensors by part, each with the slots on its first axis."""
        moments = {f"{name}.{key}": t for name, learner in self._learners() for key, t in learner.moments().items()}
        parts = {"model": self.model_tensors(), "optim": moments}
        return parts | ({"best": dict(self.best)} if self.best else {})

    def model_tensors(self) -> dict[str, Tensor]:
        """Return parameters and running statistics."""
        return dict(self.model.state_dict())

    def learners(self) -> dict[str, dict[str, Any]]:
        """Return the plain values of both learners."""
        return {name: learner.state() for name, learner in self._learners()}

    def load(self, parts: Mapping[str, Tensors], learners: Mapping[str, dict[str, Any]], *, copy: bool = True) -> None:
        """Load what ``tensors`` and ``learners`` returned; without ``copy`` the given tensors are used."""
        self.model.load_state_dict(dict(parts["model"]))
        for name, learner in self._learners():
            prefix = f"{name}."
            moments = {key.removeprefix(prefix): t for key, t in parts["optim"].items() if key.startswith(prefix)}
            learner.restore(moments, learners[name], copy=copy)
        self.best = {name: tensor.to(self.setup.device, copy=copy) for name, tensor in parts.get("best", {}).items()}

    def without(self, dropped: Sequence[int]) -> "TrainState":
        """Return a state without the slots ``dropped``."""
        remaining = [slot for slot in range(len(self.members)) if slot not in dropped]
        for _, learner in self._learners():
            learner.release_memory()
        smaller = TrainState(self.shape, [self.members[slot] for slot in remaining], self.setup)
        smaller.epoch, smaller.step_in_epoch, smaller.updates = self.epoch, self.step_in_epoch, self.updates
        parts = {part: {name: t[remaining] for name, t in tensors.items()} for part, tensors in self.tensors().items()}
        smaller.load(parts, self.learners(), copy=False)
        return smaller

    def set_rates(self, factor: float) -> None:
        """Set the learning rates of the next step, as a fraction of the initial ones."""
        for _, learner in self._learners():
            learner.set_rate(factor)

    def keep_best(self, slot: int) -> None:
        """Store a slot's current model as its best."""
        if not self.best:
            self.best = {name: tensor.clone() for name, tensor in self.model_tensors().items()}
            return
        for name, tensor in self.model_tensors().items():
            self.best[name][slot] = tensor[slot]

    def skipped(self) -> dict[str, int]:
        """Return the number of steps that each side has skipped because its gradients overflowed."""
        return {"d": self.updates - self.adversary.steps(), "g": self.updates - self.vaes.steps()}

    def finite(self) -> list[bool]:
        """Return, per slot, True if all its parameters and running statistics are finite."""
        checks = [t.flatten(1).isfinite().all(1) for t in self.model_tensors().values()]
        return [bool(ok) for ok in torch.stack(checks).all(0).cpu()]

    def checkpoint(
        self, *, identity: Mapping[str, Any], machine: Mapping[str, Any], progress: Sequence[Progress], sums: Any
    ) -> Checkpoint:
        """Return the state as a checkpoint.

        ``identity``: the training it belongs to; ``machine``: hardware and software; ``sums``: loss sums of the epoch.
        """
        values = {
            "identity": dict(identity),
            "machine": dict(machine),
            "members": self.members,
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "updates": self.updates,
            "learners": self.learners(),
            "sums": sums,
            "progress": [asdict(p) for p in progress],
        }
        return Checkpoint(self.updates, self.tensors(), values)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Resume from a checkpoint with the same members."""
        self.epoch = checkpoint.state["epoch"]
        self.step_in_epoch = checkpoint.state["step_in_epoch"]
        self.updates = checkpoint.state["updates"]
        self.load(checkpoint.tensors, checkpoint.state["learners"])

    def _learners(self) -> tuple[tuple[str, Learner], ...]:
        return ("vaes", self.vaes), ("discriminator", self.adversary)
