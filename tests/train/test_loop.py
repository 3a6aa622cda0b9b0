"""The training loop: learning, early stopping, failures, stacks."""

import platform
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from modis_dist.evaluate.evaluation import evaluate_training
from modis_dist.runtime import fingerprint
from modis_dist.runtime.errors import DataError, Interrupted
from modis_dist.study.summary import changes
from modis_dist.train import checkpoint
from modis_dist.train.callbacks import Callbacks
from modis_dist.train.journal import JournalWriter, read
from modis_dist.train.loop import fit
from modis_dist.train.prepare import prepare
from modis_dist.train.progress import improves
from modis_dist.train.state import TrainState
from modis_dist.train.validation import ValidationRows
from tests.train import toy


class Recorder:
    """A tracker that records trials and steps."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int]] = []

    def metrics(self, trial, *, step, values):  # noqa: ARG002
        self.steps.append((trial, step))

    def event(self, trial, *, kind, values):
        pass


def test_a_toy_training_is_better_than_chance(tmp_path: Path) -> None:
    (progress,) = toy.train([toy.member("t", toy.run("optim.epochs=40", "optim.lr=5e-3"), tmp_path)], tmp_path)
    assert progress.status == "done"
    assert progress.best_value is not None and progress.best_value > 0.7
    assert len(progress.history) == progress.epochs == 40


def test_the_history_has_every_loss_term_of_every_epoch(tmp_path: Path) -> None:
    (progress,) = toy.train([toy.member("t", toy.run(), tmp_path)], tmp_path)
    for row in progress.history:
        for modality in toy.SIZES:
            for term in ("reconstruction", "kl", "penalty", "class_d", "class_g", "clustering_d", "clustering_g"):
                assert np.isfinite(row[f"train/{term}/{modality}"])
        assert np.isfinite(row["train/adversarial_d"]) and np.isfinite(row["val/balanced_accuracy"])


def test_training_stops_after_patience_validations_without_improvement(tmp_path: Path) -> None:
    settings = toy.run("optim.epochs=60", "trainer.early_stopping={patience: 3}")
    (progress,) = toy.train([toy.member("t", settings, tmp_path)], tmp_path)
    values = [(row["val/balanced_accuracy"], -row["val/reconstruction_mse"]) for row in progress.history]
    assert progress.best_epoch == values.index(max(values)) + 1
    assert progress.epochs == int(np.argmax([value for value, _ in values])) + 1 + 3 < 60


def test_the_best_model_on_disk_is_that_of_the_best_epoch(tmp_path: Path) -> None:
    whole, short = tmp_path / "whole", tmp_path / "short"
    (progress,) = toy.train([toy.member("t", toy.run("optim.epochs=40", "optim.lr=5e-3"), whole)], whole)
    assert progress.best_epoch is not None and progress.best_epoch < 40, "a seed where the last is not the best"
    settings = toy.run(f"optim.epochs={progress.best_epoch}", "optim.lr=5e-3")
    toy.train([toy.member("t", settings, short)], short)
    last = checkpoint.load(checkpoint.newest(short / "last"))
    best = checkpoint.load(checkpoint.newest(whole / "t" / "best"))
    assert best.state["epoch"] == progress.best_epoch
    for name, tensor in best.tensors["model"].items():
        assert torch.equal(tensor, last.tensors["model"][name]), name


def test_a_member_trains_identically_alone_and_in_a_stack(tmp_path: Path) -> None:
    runs = [toy.run(f"seed={s}", f"objective.penalty_weight={s + 1}", f"objective.beta={s * 1e-4}") for s in range(4)]
    runs[2] = toy.run("seed=2", "objective.adversarial_loss=cross_entropy")
    together = tmp_path / "together"
    stacked = toy.train([toy.member(f"t{s}", r, together) for s, r in enumerate(runs)], together)
    for s, settings in enumerate(runs):
        alone_folder = tmp_path / f"alone{s}"
        (single,) = toy.train([toy.member("t", settings, alone_folder)], alone_folder)
        for epoch, expected in zip(single.history, stacked[s].history, strict=True):
            for key in (k for k in epoch if k.startswith("train/")):
                assert epoch[key] == pytest.approx(expected[key], rel=2e-3, abs=2e-4), (s, key)


def test_a_diverging_member_leaves_the_stack_and_is_reported_with_step_term_and_modality(tmp_path: Path) -> None:
    good = toy.run("seed=1")
    broken = prepare(toy.run("seed=2"), toy.cohort())
    values = broken.train.x["cnv"].copy()
    values[:] = 1e30  # finite, but its square is infinite
    broken = replace(broken, train=replace(broken.train, x={**broken.train.x, "cnv": values}))
    members = [toy.member("good", good, tmp_path), toy.member("bad", toy.run("seed=2"), tmp_path, prepared=broken)]
    ok, failed = toy.train(members, tmp_path)
    assert failed.status == "failed"
    assert str(failed.reason).startswith("step 1: ") and "/cnv is " in str(failed.reason)
    assert ok.status == "done" and ok.epochs == 4
    alone_folder = tmp_path / "alone"
    (single,) = toy.train([toy.member("good", good, alone_folder)], alone_folder)
    assert single.history[-1]["train/total_g"] == pytest.approx(ok.history[-1]["train/total_g"], rel=2e-3)
    assert not (tmp_path / "bad" / "best").exists()


def test_members_of_a_stack_may_stop_at_different_epochs(tmp_path: Path) -> None:
    runs = [toy.run(f"seed={s}", "optim.epochs=25", "trainer.early_stopping={patience: 3}") for s in range(3)]
    stacked = toy.train([toy.member(f"t{s}", r, tmp_path) for s, r in enumerate(runs)], tmp_path)
    assert len({p.epochs for p in stacked}) > 1, "seeds that stop at different epochs"
    for s, progress in enumerate(stacked):
        loaded = checkpoint.load(checkpoint.newest(tmp_path / f"t{s}" / "best"))
        assert loaded.state["trial"] == f"t{s}" and loaded.state["epoch"] == progress.best_epoch


def test_the_folder_of_another_training_is_refused(tmp_path: Path) -> None:
    toy.train([toy.member("one", toy.run(), tmp_path)], tmp_path)
    with pytest.raises(DataError, match=r"last/step-\d+: "):
        toy.train([toy.member("two", toy.run("seed=9"), tmp_path)], tmp_path)


def test_a_finished_training_is_not_trained_again(tmp_path: Path) -> None:
    (first,) = toy.train([toy.member("t", toy.run(), tmp_path)], tmp_path)
    recorder = Recorder()
    (again,) = toy.train([toy.member("t", toy.run(), tmp_path)], tmp_path, callbacks=Callbacks(tracker=recorder))
    assert again == first and recorder.steps == []


def test_the_journal_holds_every_epoch_once(tmp_path: Path) -> None:
    journal = JournalWriter(tmp_path / "journal.jsonl")
    toy.train([toy.member("t", toy.run(), tmp_path)], tmp_path, callbacks=Callbacks(tracker=journal))
    journal.close()
    records = read(tmp_path / "journal.jsonl")
    assert [r["step"] for r in records if r["kind"] == "metrics"] == [1, 2, 3, 4]


def test_a_lower_reconstruction_error_is_an_improvement() -> None:
    assert improves(0.1, 0.2, metric="reconstruction_mse") and not improves(0.3, 0.2, metric="reconstruction_mse")
    assert improves(0.3, 0.2, metric="nmi") and not improves(0.25, 0.2, metric="nmi", margin=0.1)


@pytest.mark.parametrize("metric", ["nmi", "reconstruction_mse"])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_value_is_never_the_best(odd: float, metric: str) -> None:
    assert not improves(odd, None, metric=metric) and not improves(odd, 0.5, metric=metric)
    assert improves(0.5, None, metric=metric)


def test_an_epoch_of_few_rows_has_one_step(tmp_path: Path) -> None:
    settings = toy.run("optim.batch_size=64", "optim.epochs=2")
    (progress,) = toy.train([toy.member("t", settings, tmp_path)], tmp_path)
    assert progress.status == "done" and checkpoint.newest(tmp_path / "last").name == "step-00000002"


def test_equal_validation_metrics_are_ranked_by_reconstruction_and_patience_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validations = iter([(0.5, 3.0), (0.9, 2.0), (0.9, 1.0), (0.8, 0.1), (0.9, 1.5)])

    def validate(*_: object) -> list[dict[str, float]]:
        accuracy, error = next(validations)
        return [{"balanced_accuracy": accuracy, "reconstruction_mse": error}]

    monkeypatch.setattr(ValidationRows, "validate", validate)
    settings = toy.run("optim.epochs=25", "trainer.early_stopping={patience: 3}")
    (progress,) = toy.train([toy.member("t", settings, tmp_path)], tmp_path)
    assert (progress.best_epoch, progress.best_value, progress.best_error) == (3, 0.9, 1.0)
    assert progress.epochs == 5, "three validations without a better metric since the second"


def test_learning_rates_fall_along_half_a_cosine_from_the_first_step_to_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, float]] = []
    set_rates = TrainState.set_rates

    def spy(state: TrainState, factor: float) -> None:
        set_rates(state, factor)
        optimisers = (state.vaes.optimiser, state.adversary.optimiser)
        seen.append(tuple(optimiser.param_groups[0]["lr"] for optimiser in optimisers))

    monkeypatch.setattr(TrainState, "set_rates", spy)
    rates = ("optim.lr=1e-3", "optim.lr_discriminator=4e-3", "optim.lr_schedule=cosine", "optim.epochs=3")
    toy.train([toy.member("t", toy.run(*rates), tmp_path)], tmp_path)
    n = len(seen)
    assert n >= 6
    for step, (vae, discriminator) in enumerate(seen):
        assert vae == pytest.approx(1e-3 * np.cos(np.pi * step / n / 2) ** 2)
        assert discriminator == pytest.approx(4 * vae)


class StopAt:
    """Requests a stop at the n-th call."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def requested(self) -> str | None:
        self.left -= 1
        return "stop requested" if self.left == 0 else None


def test_resuming_with_another_number_of_threads_logs_that_results_may_differ(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = [toy.member("t", toy.run(), tmp_path)]
    with pytest.raises(Interrupted):
        toy.train(members, tmp_path, callbacks=Callbacks(stop=StopAt(2)))
    torch.set_num_threads(2)
    with pytest.raises(Interrupted):
        fit(members, folder=tmp_path, device=toy.CPU, callbacks=Callbacks(stop=StopAt(2)))
    assert "threads 1, now 2" in caplog.text
    caplog.clear()
    fit(members, folder=tmp_path, device=toy.CPU)
    assert caplog.text == ""


def test_resuming_on_another_cpu_is_noted_unless_the_first_cpu_is_unknown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [toy.member("t", toy.run(), tmp_path)]
    with monkeypatch.context() as changed:
        changed.setattr(fingerprint, "processor", lambda: "Slow 1")
        for _ in range(2):
            with pytest.raises(Interrupted):
                toy.train(members, tmp_path, callbacks=Callbacks(stop=StopAt(2)))
        assert not caplog.text
        changed.setattr(fingerprint, "processor", lambda: "Fast 2")
        with pytest.raises(Interrupted):
            toy.train(members, tmp_path, callbacks=Callbacks(stop=StopAt(2)))
    assert "model Slow 1, now Fast 2" in caplog.text
    (progress,) = toy.train(members, tmp_path)
    there_and_back = ["model Slow 1, now Fast 2", f"model Fast 2, now {fingerprint.processor()}"]
    result = evaluate_training(members[0], progress, evaluated_on="validation", probe=False, baselines={})
    assert result["changes"] == there_and_back
    assert changes({"t": result, "u": result | {"changes": []}}) == {"t": there_and_back}
    now = fingerprint.machine(toy.CPU, ranks=1)
    assert fingerprint.changed({name: now[name] for name in now if name != "model"}, now) == []


def test_the_processor_has_the_name_given_by_the_system_or_its_architecture(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nmodel\t\t: 143\nmodel name\t: AMD EPYC: 7763\nprocessor\t: 1\nmodel name\t: other\n"
    )
    assert fingerprint.processor(cpuinfo) == "AMD EPYC: 7763"
    cpuinfo.write_text("processor\t: 0\nCPU part\t: 0xd0c\n")
    assert fingerprint.processor(cpuinfo) == fingerprint.processor(tmp_path / "none") == platform.machine()


def test_a_stop_at_the_last_step_of_an_epoch_completes_the_epoch_first(tmp_path: Path) -> None:
    member, steps = toy.member("t", toy.run(), tmp_path), 4
    with pytest.raises(Interrupted, match=f"step-{2 * steps:08d}"):
        toy.train([member], tmp_path, callbacks=Callbacks(stop=StopAt(2 * steps)))
    loaded = checkpoint.load(checkpoint.newest(tmp_path / "last")).state
    assert (loaded["epoch"], loaded["step_in_epoch"], len(loaded["progress"][0]["history"])) == (2, 0, 2)


def stack(folder: Path) -> list:
    """Return two members with early stopping and at most 5 epochs."""
    shared = ("optim.epochs=5", "trainer.checkpoint_every=2", "trainer.early_stopping={patience: 2}")
    shared += ("optim.lr_schedule=cosine",)
    return [toy.member(f"t{s}", toy.run(f"seed={s}", *shared), folder) for s in range(2)]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors in the last and best checkpoints."""
    tensors_by_name = {}
    for part in ("last", "t0/best", "t1/best"):
        loaded = checkpoint.load(checkpoint.newest(folder / part))
        tensors_by_name |= {
            f"{part}/{file}/{k}": v for file, tensors in loaded.tensors.items() for k, v in tensors.items()
        }
    return tensors_by_name


def test_a_stack_that_stops_at_given_epochs_ends_bit_identically(tmp_path: Path) -> None:
    uninterrupted, waiting = tmp_path / "uninterrupted", tmp_path / "waiting"
    expected = toy.train(stack(uninterrupted), uninterrupted)
    for until in (1, 1, 3):
        loaded = fit(stack(waiting), folder=waiting, device=toy.CPU, until=until)
        assert (
            all(member.epochs == until for member in loaded if member.status == "running")
            and loaded[0].status == "running"
        )
    assert fit(stack(waiting), folder=waiting, device=toy.CPU) == expected
    want, got = tensors_of(uninterrupted), tensors_of(waiting)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_a_pruned_member_leaves_the_stack_and_the_other_is_bit_identical(tmp_path: Path) -> None:
    shared, alone_folder = tmp_path / "shared", tmp_path / "alone"
    fit(stack(shared), folder=shared, device=toy.CPU, until=2)
    remaining, left = fit(stack(shared), folder=shared, device=toy.CPU, pruned={"t1": "rank 2 of 2"})
    assert (left.status, left.reason, left.epochs, len(left.history)) == ("pruned", "rank 2 of 2", 2, 2)
    assert remaining.status == "done" and not (shared / "t1" / "best").exists()
    (single,) = toy.train(stack(alone_folder)[:1], alone_folder)
    assert single.epochs == remaining.epochs > 2
    for epoch, expected in zip(single.history, remaining.history, strict=True):
        for key in (key for key in epoch if key.startswith("train/")):
            assert epoch[key] == pytest.approx(expected[key], rel=2e-3, abs=2e-4), key


def test_a_stop_at_the_last_step_of_the_training_finishes_it(tmp_path: Path) -> None:
    member, steps = toy.member("t", toy.run("optim.epochs=1"), tmp_path), 4
    (progress,) = toy.train([member], tmp_path, callbacks=Callbacks(stop=StopAt(steps)))
    assert progress.status == "done"
