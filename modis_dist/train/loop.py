"""The training loop: two phases a step, validation, early stopping, checkpoints, exact resume.

``fit`` trains a stack of replicates; one replicate is the ordinary case and the same code. A replicate that fails or
stops early leaves the stack and the others go on undisturbed. Knows nothing of terminals, Ray, MLflow or SLURM.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import cos, pi
from pathlib import Path
from typing import Any, TypeVar

import torch

from modis_dist.distributed import ALONE, World
from modis_dist.objective import Rules
from modis_dist.runtime.errors import DataError, DiskFailed, Interrupted
from modis_dist.runtime.fingerprint import changed, machine
from modis_dist.train import checkpoint
from modis_dist.train.callbacks import NeverStop, NullReporter, NullTracker, Reporter, Stop, Tracker
from modis_dist.train.checkpoint import Checkpoint
from modis_dist.train.loader import Loader
from modis_dist.train.loss_log import LossLog, NonFinite
from modis_dist.train.prepare import shape
from modis_dist.train.progress import Progress
from modis_dist.train.stack import Member, best_model, set_library_sizes, stack_weights
from modis_dist.train.state import Setup, TrainState
from modis_dist.train.validation import ValidationRows

T = TypeVar("T")
AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Ports:
    """The world outside; silent by default."""

    tracker: Tracker = field(default_factory=NullTracker)
    reporter: Reporter = field(default_factory=NullReporter)
    stop: Stop = field(default_factory=NeverStop)


def fit(
    members: Sequence[Member],
    *,
    folder: Path,
    device: torch.device,
    ports: Ports | None = None,
    dtype: torch.dtype = torch.float32,
    world: World = ALONE,
    until: int | None = None,
    pruned: Mapping[str, str] | None = None,
) -> list[Progress]:
    """Train a stack, or continue it from ``folder/last``; returns every member's progress, done or failed.

    The members may differ in seed, fold, scenario and loss weights only. Each member's best model is written to its
    ``folder/best``. Of several ranks all call this, with the same members, and rank 0 writes. ``until`` is an epoch to
    save at and return, with members still running; ``pruned`` says why members (by trial) leave before anything else
    is done. Raises ``Interrupted`` after saving, where the stop port asks for it, ``DiskFailed`` where a checkpoint
    that must be saved cannot be, ``DataError`` where ``folder`` belongs to another training.
    """
    training = Training(
        members, folder=folder, device=device, ports=ports or Ports(), dtype=dtype, world=world, until=until
    )
    training.begin()
    training.prune(pruned or {})
    while training.running():
        state = training.state
        while training.running() and state.step_in_epoch < training.loader.steps:
            batch = training.loader.batch(epoch=state.epoch, step=state.step_in_epoch)
            state.set_rates(training.rate())

            # Phase D: the discriminator learns to name modality and class; the encoders stand still.
            adversary = state.adversary.learn(batch, training.weights, training.rules)

            # Phase G: the VAEs learn to reconstruct, to be classified and to hide the modality.
            vae = state.vaes.learn(batch, training.weights, training.rules)

            state.step_in_epoch += 1
            state.updates += 1

            # Losses cross to the host in windows; a replicate with a non-finite loss leaves the stack.
            training.log.record(adversary, vae)
            state = training.after_step()

        # End of the epoch: means, validation, best model, early stopping, checkpoint.
        if training.running():
            training.end_epoch()
    return training.progress


class Training:
    """The moving parts of ``fit``: the state, and what must shrink with it when a replicate leaves."""

    def __init__(
        self,
        members: Sequence[Member],
        *,
        folder: Path,
        device: torch.device,
        ports: Ports,
        dtype: torch.dtype,
        world: World,
        until: int | None,
    ) -> None:
        first = members[0]
        self.members = list(members)
        self.run = first.run
        self.folder = folder
        self.ports = ports if world.rank == 0 else Ports(stop=ports.stop)
        self.world = world
        self.device = device
        self.dtype = dtype
        self.until = first.run.optim.epochs if until is None else until
        sizes = {m: len(pipeline.features_out) for m, pipeline in first.prepared.pipelines.items()}
        self.shape = shape(first.run, sizes, len(first.prepared.classes))
        self.progress = [Progress(member.trial) for member in members]
        objective = first.run.objective
        autocast_dtype = AUTOCAST_DTYPES[first.run.trainer.precision]
        self.rules = Rules(objective.kl_reduction, objective.penalty, objective.penalty_on, autocast_dtype)
        self.asked: str | None = None  # why to stop
        self.validated = first.prepared.validation is not None

    # --- starting and continuing ----------------------------------------------------------------------------

    def begin(self) -> None:
        """Start afresh, or from the newest valid checkpoint."""
        found = self.world.awaited(lambda: checkpoint.newest(self.folder / "last"))
        setup = Setup(
            self.run.optim, self.device, self.dtype, self.world, scaled=self.rules.autocast_dtype == torch.float16
        )
        if found is None:
            state = TrainState.start(self.shape, [member.run.seed for member in self.members], setup)
            set_library_sizes(state.model, self.members)
            self._adopt(state)
            for member in self.members:
                self.ports.tracker.event(member.trial, kind="start", values={"epoch": 0})
            return
        held = checkpoint.load(found)
        self._check_identity(held.state["identity"], found)
        self.progress = [Progress(**values) for values in held.state["progress"]]
        self._compare_machine(held.state["machine"])
        state = TrainState(self.shape, held.state["members"], setup)
        state.restore(held)
        self._adopt(state)
        self.log.restore(held.state["sums"])
        self._leave([r for r, p in enumerate(self._active()) if p.status == "done"])

    def prune(self, reasons: Mapping[str, str]) -> None:
        """Continue without the members that are not wanted any further."""
        leaving = [r for r, held in enumerate(self._active()) if held.trial in reasons]
        for held in [self._active()[r] for r in leaving]:
            held.status, held.reason = "pruned", reasons[held.trial]
        self._leave(leaving)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint belongs to."""
        return {"trials": [member.trial for member in self.members]}

    def _check_identity(self, found: Mapping[str, Any], where: Path) -> None:
        if found != self.identity():
            raise DataError(
                f"{where}: belongs to another training (settings or data differ); use another output folder, "
                "or the settings it was started with"
            )

    def _machine(self) -> dict[str, Any]:
        return machine(self.device, ranks=self.world.size)

    def _compare_machine(self, before: Mapping[str, Any]) -> None:
        changes = changed(before, self._machine())
        if changes:
            logging.getLogger(__name__).warning(
                "%s: continues, though not to the bit, what began with %s", self.folder, "; ".join(changes)
            )
        for held in self.progress:
            held.changes += changes if held.status == "running" else []

    def _adopt(self, state: TrainState) -> None:
        """Make everything that has a replicate axis fit the state."""
        active = [self.members[i] for i in state.members]
        self.state = state
        if not active:
            return
        optim, prepared = self.run.optim, [member.prepared for member in active]
        self.loader = Loader(
            prepared,
            [member.run.seed for member in active],
            batch_size=optim.batch_size,
            epoch_ends=optim.epoch_ends,
            labelled_share=optim.labelled_share,
            latent=self.shape.latent,
            signs=self.rules.penalty == "each",
            device=self.device,
            dtype=self.dtype,
            world=self.world,
        )
        self.weights = stack_weights(active, device=self.device, dtype=self.dtype)
        self.held_out = (
            ValidationRows(prepared, device=self.device, dtype=self.dtype, world=self.world) if self.validated else None
        )
        self.log = LossLog(
            self.loader.modalities, replicates=len(active), window=self.run.trainer.log_every, world=self.world
        )

    # --- during an epoch ------------------------------------------------------------------------------------

    def running(self) -> bool:
        """Whether a replicate is left to train, and an epoch to train it."""
        return bool(self.state.members) and self.state.epoch < self.until

    def rate(self) -> float:
        """Learning rate of the next step, as a share of ``optim.lr``: 1, or from 1 to 0 along half a cosine."""
        optim = self.run.optim
        if optim.lr_schedule == "constant":
            return 1.0
        return 0.5 * (1 + cos(pi * self.state.updates / (optim.epochs * self.loader.steps)))

    def after_step(self) -> TrainState:
        """Look at the window where it is full; save and raise ``Interrupted`` where a stop is asked for.

        After the last step of an epoch the epoch is closed first: a checkpoint's number stands for one state only.
        """
        self.asked = self._stop_requested()
        if self.log.full() or self.asked:
            self._drop_failed(self.log.flush(update=self.state.updates))
        if self.state.step_in_epoch < self.loader.steps:
            self._stop_if_asked()
        return self.state

    def _stop_requested(self) -> str | None:
        """Why to stop; of several ranks the first decides, once in a window, since asking it takes time."""
        if self.world.size > 1 and self.state.updates % self.run.trainer.log_every:
            return None
        return self.world.agreed(self.ports.stop.requested)

    def _stop_if_asked(self) -> None:
        if not self.asked or not self.state.members:
            return
        try:
            saved = self._save(checkpoint.must_save)
        except DiskFailed as failure:
            raise DiskFailed(f"{self.asked}; {failure}") from failure
        raise Interrupted(f"{self.asked}; saved {saved}; the same command continues")

    def _active(self) -> list[Progress]:
        return [self.progress[i] for i in self.state.members]

    def _drop_failed(self, failures: Sequence[NonFinite]) -> None:
        for failure in failures:
            self._fail(failure.replicate, str(failure))
        self._leave([failure.replicate for failure in failures])

    def _fail(self, replicate: int, reason: str) -> None:
        held = self._active()[replicate]
        held.status, held.reason = "failed", reason
        self.ports.tracker.event(held.trial, kind="end", values={"status": "failed", "reason": reason})

    def _leave(self, dropped: Sequence[int]) -> None:
        """Continue without some replicates; those that are done get their best model written."""
        if not dropped:
            return
        for replicate in dropped:
            if self._active()[replicate].status == "done":
                self._write_best(replicate)
        log = self.log
        log.without(dropped)
        smaller = self.state.without(dropped)
        if smaller.members:
            del self.loader, self.held_out  # makes room on the device for the same features
        self._adopt(smaller)
        if self.state.members:
            self.log.restore(log.state())

    # --- end of an epoch ------------------------------------------------------------------------------------

    def end_epoch(self) -> None:
        """Close the epoch: means, validation, best, early stopping, checkpoint."""
        self._drop_failed(self.log.flush(update=self.state.updates))
        self._drop_unsound()
        if not self.running():
            return
        state = self.state
        state.epoch, state.step_in_epoch = state.epoch + 1, 0
        rows = self.log.means()
        if self._count_skipped(rows):
            return
        for held in self._active():
            held.epochs = state.epoch
        self._validate(rows)
        for held, row in zip(self._active(), rows, strict=True):
            held.history.append({"epoch": float(state.epoch)} | row)
            self.ports.tracker.metrics(held.trial, step=state.epoch, values=row)
        finished = [r for r, held in enumerate(self._active()) if self._finished(held)]
        for r in finished:
            self._active()[r].status = "done"
        if len(finished) == len(state.members) or state.epoch == self.until:
            self._save(checkpoint.must_save)
        elif finished or state.epoch % self.run.trainer.checkpoint_every == 0:
            self._save(checkpoint.try_to_save)
        self.ports.reporter.progress(
            epoch=state.epoch, epochs=self.run.optim.epochs, active=len(state.members), headline=rows[0]
        )
        self._leave(finished)
        self._stop_if_asked()

    def _drop_unsound(self) -> None:
        """A finite loss may still have had a gradient that is not; such a state is never saved."""
        bad = [r for r, sound in enumerate(self.state.finite()) if not sound]
        for replicate in bad:
            self._fail(replicate, f"step {self.state.updates}: parameters are not finite")
        self._leave(bad)

    def _count_skipped(self, rows: list[dict[str, float]]) -> bool:
        """With scaled losses, add the steps skipped so far; true where an epoch of nothing else ended the training."""
        state = self.state
        if not state.setup.scaled:
            return False
        skipped = {f"skipped_{side}": float(number) for side, number in state.skipped().items()}
        for number, held in enumerate(self._active()):
            before = held.history[-1] if held.history else {}
            lost = [side for side, now in skipped.items() if now - before.get(f"train/{side}", 0) >= self.loader.steps]
            if lost:
                reason = f"epoch {state.epoch}: every step overflowed in fp16 ({', '.join(lost)}); say bf16, or fp32"
                self._fail(number, reason)
            rows[number] |= {f"train/{side}": now for side, now in skipped.items()}
        self._leave([r for r, held in enumerate(self._active()) if held.status == "failed"])
        return not self.state.members

    def _validate(self, rows: list[dict[str, float]]) -> None:
        """Add validation figures to the rows of this epoch and keep the models that improved."""
        trainer, epoch = self.run.trainer, self.state.epoch
        if self.held_out is None or (epoch % trainer.validate_every and epoch < self.run.optim.epochs):
            return
        margin = trainer.early_stopping.min_delta if trainer.early_stopping else 0.0
        for replicate, figures in enumerate(self.held_out.validate(self.state.model)):
            rows[replicate] |= {f"val/{name}": value for name, value in figures.items()}
            if self._active()[replicate].validated(figures, metric=trainer.metric, margin=margin):
                self.state.keep_best(replicate)

    def _finished(self, held: Progress) -> bool:
        patience = self.run.trainer.early_stopping
        stopped = patience is not None and self.validated and held.waited >= patience.patience
        return stopped or self.state.epoch >= self.run.optim.epochs

    def _content(self) -> Checkpoint:
        """The stack as it is saved."""
        return self.state.checkpoint(
            identity=self.identity(), machine=self._machine(), progress=self.progress, sums=self.log.state()
        )

    def _save(self, save: Callable[[Path, Checkpoint], T]) -> T:
        """Write the last checkpoint of the stack, on the first rank."""
        content = self._content()
        return self.world.awaited(lambda: save(self.folder / "last", content))

    def _write_best(self, replicate: int) -> None:
        """Write a replicate's best model, on the first rank."""
        held = self._active()[replicate]
        member = self.members[self.state.members[replicate]]
        source = self.state.best if held.best_epoch is not None else self.state.model_tensors()
        tensors = {name: tensor[replicate : replicate + 1] for name, tensor in source.items()}
        best = best_model(member, held, tensors, shape=self.shape, steps=self.loader.steps)
        where = self.world.awaited(lambda: checkpoint.must_save(member.folder / "best", best))
        values = {"path": str(where), "epoch": best.state["epoch"]}
        self.ports.tracker.event(member.trial, kind="checkpoint", values=values)
