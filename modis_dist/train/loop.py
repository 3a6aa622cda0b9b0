"""The training loop: two phases a step, validation, early stopping, checkpoints, exact resume.

``fit`` trains a stack; a single training is a stack of one. A member that fails or stops early leaves the stack, and
the others continue unaffected. Independent of terminals, Ray, MLflow and Slurm.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from math import cos, pi
from pathlib import Path
from typing import Any, TypeVar

import torch

from modis_dist.distributed import ALONE, World
from modis_dist.runtime.errors import DataError, DiskFailed, Interrupted
from modis_dist.runtime.fingerprint import changed, machine
from modis_dist.train import checkpoint
from modis_dist.train.callbacks import Callbacks
from modis_dist.train.checkpoint import Checkpoint
from modis_dist.train.loader import Loader
from modis_dist.train.loss_log import LossLog
from modis_dist.train.prepare import shape
from modis_dist.train.progress import Progress
from modis_dist.train.stack import Member, best_model, rules, set_library_sizes, stack_weights
from modis_dist.train.state import Setup, TrainState
from modis_dist.train.validation import ValidationRows

T = TypeVar("T")


def fit(
    members: Sequence[Member],
    *,
    folder: Path,
    device: torch.device,
    callbacks: Callbacks | None = None,
    dtype: torch.dtype = torch.float32,
    world: World = ALONE,
    until: int | None = None,
    pruned: Mapping[str, str] | None = None,
) -> list[Progress]:
    """Train a stack, or resume it from ``folder/last``; return the progress of every member.

    Members may differ in seed, fold, scenario and loss weights only. The best model of each goes to its
    ``folder/best``. Collective: every rank calls it with the same members; only rank 0 writes. ``until``: epoch at
    which to save and return, with members still running. ``pruned``: trials to drop first, with the reason. Raises
    ``Interrupted`` after saving if the stop callback requests it, ``DiskFailed`` if a required checkpoint cannot be
    saved, ``DataError`` if ``folder`` belongs to another training.
    """
    training = Training(
        members, folder=folder, device=device, callbacks=callbacks or Callbacks(), dtype=dtype, world=world, until=until
    )
    training.begin()
    training.prune(pruned or {})
    while training.running():
        state = training.state
        while training.running() and state.step_in_epoch < training.loader.steps:
            batch = training.loader.batch(epoch=state.epoch, step=state.step_in_epoch)
            state.set_rates(training.rate())

            # Phase D: train the discriminator to tell modality and class; the encoders are frozen.
            adversary = state.adversary.learn(batch, training.weights, training.rules)

            # Phase G: train the VAEs to reconstruct, to be classified and to hide the modality.
            vae = state.vaes.learn(batch, training.weights, training.rules)

            state.step_in_epoch += 1
            state.updates += 1

            # Copy losses to the host once per window of steps; members with a non-finite loss leave the stack.
            training.log.record(adversary, vae)
            state = training.after_step()

        # End of epoch: mean losses, validation, best model, early stopping, checkpoint.
        if training.running():
            training.end_epoch()
    return training.progress


class Training:
    """The parts of ``fit``: the state, and all that is rebuilt when a member leaves the stack."""

    def __init__(
        self,
        members: Sequence[Member],
        *,
        folder: Path,
        device: torch.device,
        callbacks: Callbacks,
        dtype: torch.dtype,
        world: World,
        until: int | None,
    ) -> None:
        run, prepared = members[0].run, members[0].prepared
        self.members = list(members)
        self.run = run
        self.folder = folder
        self.callbacks = callbacks if world.rank == 0 else Callbacks(stop=callbacks.stop)
        self.world = world
        self.device = device
        self.dtype = dtype
        self.until = run.optim.epochs if until is None else until
        sizes = {m: len(pipeline.features_out) for m, pipeline in prepared.pipelines.items()}
        self.shape = shape(run, sizes, len(prepared.classes))
        self.progress = [Progress(member.trial) for member in members]
        self.identity = {"trials": [member.trial for member in members]}  # of the checkpoints of this training
        self.machine = machine(device, ranks=world.size)
        self.rules = rules(run)
        self.stop_reason: str | None = None
        self.validated = prepared.validation is not None

    # --- starting and resuming ------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start, or resume from the newest valid checkpoint."""
        path = self.world.broadcast_when_done(lambda: checkpoint.newest(self.folder / "last"))
        setup = Setup(
            self.run.optim, self.device, self.dtype, self.world, scaled=self.rules.autocast_dtype == torch.float16
        )
        if path is None:
            state = TrainState.start(self.shape, [member.run.seed for member in self.members], setup)
            set_library_sizes(state.model, self.members)
            self._adopt(state)
            for member in self.members:
                self.callbacks.tracker.event(member.trial, kind="start", values={"epoch": 0})
            return
        saved = checkpoint.load(path)
        if saved.state["identity"] != self.identity:
            raise DataError(
                f"{path}: belongs to another training (settings or data differ); use another output folder, or the "
                "settings it was started with"
            )
        self.progress = [Progress(**values) for values in saved.state["progress"]]
        self._compare_machine(saved.state["machine"])
        state = TrainState(self.shape, saved.state["members"], setup)
        state.restore(saved)
        self._adopt(state)
        self.log.restore(saved.state["sums"])
        self._drop([slot for slot, progress in enumerate(self._active()) if progress.status == "done"])

    def prune(self, reasons: Mapping[str, str]) -> None:
        """Drop the members that were pruned."""
        slots = [slot for slot, progress in enumerate(self._active()) if progress.trial in reasons]
        for progress in [self._active()[slot] for slot in slots]:
            progress.status, progress.reason = "pruned", reasons[progress.trial]
        self._drop(slots)

    def _compare_machine(self, before: Mapping[str, Any]) -> None:
        changes = changed(before, self.machine)
        if changes:
            logging.getLogger(__name__).warning(
                "%s: resumed on different hardware or software (%s); results may not be bit-identical",
                self.folder,
                "; ".join(changes),
            )
        for progress in self.progress:
            progress.changes += changes if progress.status == "running" else []

    def _adopt(self, state: TrainState) -> None:
        """Set the state, and rebuild everything that has a slot axis for its members."""
        active = [self.members[i] for i in state.members]
        self.state = state
        if not active:
            return
        optim, prepared = self.run.optim, [member.prepared for member in active]
        self.loader = Loader(
            prepared,
            [member.run.seed for member in active],
            batch_size=optim.batch_size,
            epoch_length=optim.epoch_length,
            min_labelled_fraction=optim.min_labelled_fraction,
            latent=self.shape.latent,
            signs=self.rules.penalty_outputs == "each",
            device=self.device,
            dtype=self.dtype,
            world=self.world,
        )
        self.weights = stack_weights(active, device=self.device, dtype=self.dtype)
        self.validation_rows = (
            ValidationRows(prepared, device=self.device, dtype=self.dtype, world=self.world) if self.validated else None
        )
        self.log = LossLog(
            self.loader.modalities, slots=len(active), window=self.run.trainer.log_every, world=self.world
        )

    # --- during an epoch ------------------------------------------------------------------------------------

    def running(self) -> bool:
        """Return True while members and epochs remain."""
        return bool(self.state.members) and self.state.epoch < self.until

    def rate(self) -> float:
        """Return the next step's learning rate as a fraction of ``optim.lr``: 1, or half a cosine from 1 to 0."""
        optim = self.run.optim
        if optim.lr_schedule == "constant":
            return 1.0
        return 0.5 * (1 + cos(pi * self.state.updates / (optim.epochs * self.loader.steps)))

    def after_step(self) -> TrainState:
        """Check the losses of a full window; on a stop request, save and raise ``Interrupted``.

        After the last step of an epoch, ``end_epoch`` saves instead, so that a step number identifies one state.
        """
        self.stop_reason = self._stop_requested()
        if self.log.full() or self.stop_reason:
            self._flush_losses()
        if self.state.step_in_epoch < self.loader.steps:
            self._stop_if_requested()
        return self.state

    def _stop_requested(self) -> str | None:
        """Return the reason to stop, or None. Rank 0 decides; with several ranks only once per window, to save time."""
        if self.world.size > 1 and self.state.updates % self.run.trainer.log_every:
            return None
        return self.world.broadcast(self.callbacks.stop.requested)

    def _stop_if_requested(self) -> None:
        if not self.stop_reason or not self.state.members:
            return
        try:
            saved = self._save(checkpoint.must_save)
        except DiskFailed as failure:
            raise DiskFailed(f"{self.stop_reason}; {failure}") from failure
        raise Interrupted(f"{self.stop_reason}; saved {saved}; rerun the same command to resume")

    def _active(self) -> list[Progress]:
        return [self.progress[i] for i in self.state.members]

    def _flush_losses(self) -> None:
        """Add the window of losses to the sums; members with a non-finite loss fail."""
        failures = self.log.flush(update=self.state.updates)
        for failure in failures:
            self._fail(failure.slot, str(failure))
        self._drop([failure.slot for failure in failures])

    def _fail(self, slot: int, reason: str) -> None:
        progress = self._active()[slot]
        progress.status, progress.reason = "failed", reason
        self.callbacks.tracker.event(progress.trial, kind="end", values={"status": "failed", "reason": reason})

    def _drop(self, dropped: Sequence[int]) -> None:
        """Remove slots from the stack; write the best model of those that are done."""
        if not dropped:
            return
        for slot in dropped:
            if self._active()[slot].status == "done":
                self._write_best(slot)
        log = self.log
        log.without(dropped)
        smaller = self.state.without(dropped)
        if smaller.members:
            del self.loader, self.validation_rows  # frees device memory before the same features are stored again
        self._adopt(smaller)
        if self.state.members:
            self.log.restore(log.state())

    # --- end of an epoch ------------------------------------------------------------------------------------

    def end_epoch(self) -> None:
        """End the epoch: mean losses, validation, best model, early stopping, checkpoint."""
        self._flush_losses()
        self._drop_non_finite()
        if not self.running():
            return
        state = self.state
        state.epoch, state.step_in_epoch = state.epoch + 1, 0
        rows = self.log.means()
        if self._count_skipped(rows):
            return
        for progress in self._active():
            progress.epochs = state.epoch
        self._validate(rows)
        for progress, row in zip(self._active(), rows, strict=True):
            progress.history.append({"epoch": float(state.epoch)} | row)
            self.callbacks.tracker.metrics(progress.trial, step=state.epoch, values=row)
        finished = [slot for slot, progress in enumerate(self._active()) if self._is_finished(progress)]
        for slot in finished:
            self._active()[slot].status = "done"
        if len(finished) == len(state.members) or state.epoch == self.until:
            self._save(checkpoint.must_save)
        elif finished or state.epoch % self.run.trainer.checkpoint_every == 0:
            self._save(checkpoint.try_to_save)
        self.callbacks.reporter.progress(
            epoch=state.epoch, epochs=self.run.optim.epochs, active=len(state.members), headline=rows[0]
        )
        self._drop(finished)
        self._stop_if_requested()

    def _drop_non_finite(self) -> None:
        """Drop slots with non-finite parameters, possible even if losses are finite; such a state is never saved."""
        bad = [slot for slot, finite in enumerate(self.state.finite()) if not finite]
        for slot in bad:
            self._fail(slot, f"step {self.state.updates}: parameters are not finite")
        self._drop(bad)

    def _count_skipped(self, rows: list[dict[str, float]]) -> bool:
        """If losses are scaled, add the number of skipped steps to ``rows``; return True if no member is left.

        A member fails if a learner skipped every step of the epoch.
        """
        state = self.state
        if not state.setup.scaled:
            return False
        skipped = {f"skipped_{side}": float(number) for side, number in state.skipped().items()}
        for slot, progress in enumerate(self._active()):
            before = progress.history[-1] if progress.history else {}
            lost = [side for side, now in skipped.items() if now - before.get(f"train/{side}", 0) >= self.loader.steps]
            if lost:
                reason = f"epoch {state.epoch}: every step overflowed in fp16 ({', '.join(lost)})"
                self._fail(slot, f"{reason}; set trainer.precision to bf16 or fp32")
            rows[slot] |= {f"train/{side}": now for side, now in skipped.items()}
        self._drop([slot for slot, progress in enumerate(self._active()) if progress.status == "failed"])
        return not self.state.members

    def _validate(self, rows: list[dict[str, float]]) -> None:
        """Add validation metrics to the rows of this epoch and keep the models that improved."""
        trainer, epoch = self.run.trainer, self.state.epoch
        if self.validation_rows is None or (epoch % trainer.validate_every and epoch < self.run.optim.epochs):
            return
        margin = trainer.early_stopping.min_delta if trainer.early_stopping else 0.0
        for slot, metrics in enumerate(self.validation_rows.validate(self.state.model)):
            rows[slot] |= {f"val/{name}": value for name, value in metrics.items()}
            if self._active()[slot].record_validation(metrics, metric=trainer.metric, margin=margin):
                self.state.keep_best(slot)

    def _is_finished(self, progress: Progress) -> bool:
        early = self.run.trainer.early_stopping
        stopped = early is not None and self.validated and progress.waited >= early.patience
        return stopped or self.state.epoch >= self.run.optim.epochs

    def _save(self, save: Callable[[Path, Checkpoint], T]) -> T:
        """Write the stack's ``last`` checkpoint on rank 0."""
        content = self.state.checkpoint(
            identity=self.identity, machine=self.machine, progress=self.progress, sums=self.log.state()
        )
        return self.world.broadcast_when_done(lambda: save(self.folder / "last", content))

    def _write_best(self, slot: int) -> None:
        """Write a slot's best model on rank 0."""
        progress = self._active()[slot]
        member = self.members[self.state.members[slot]]
        source = self.state.best if progress.best_epoch is not None else self.state.model_tensors()
        tensors = {name: tensor[slot : slot + 1] for name, tensor in source.items()}
        best = best_model(member, progress, tensors, shape=self.shape, steps=self.loader.steps)
        path = self.world.broadcast_when_done(lambda: checkpoint.must_save(member.folder / "best", best))
        values = {"path": str(path), "epoch": best.state["epoch"]}
        self.callbacks.tracker.event(member.trial, kind="checkpoint", values=values)
