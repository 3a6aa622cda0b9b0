"""Kills of a training at exact points: at every optimiser step and in every phase of a write, repeatedly.

One process imports PyTorch and forks a child for each start of a training (0.1 s instead of 3). The child announces
markers over a pipe and waits for replies, so that SIGKILL hits exactly there. The final files must be bit-identical to
those of an uninterrupted training. Only the child is patched; the package has no code for this.

Use it from a process that has set one thread at its start: a fork copies only the calling thread.
"""

import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from modis_dist.config.run import Run
from modis_dist.data.store.reader import Store
from modis_dist.evaluate import evaluation, results
from modis_dist.execution import run_pack, single
from modis_dist.execution.trial import Trial, trial_id
from modis_dist.execution.verify_resume import differences
from modis_dist.runtime import files
from modis_dist.runtime.errors import Interrupted, RankLost
from modis_dist.train import checkpoint, journal
from modis_dist.train.callbacks import NeverStop, NullReporter
from modis_dist.train.process_group import ALONE, RankSpec
from tests.bare import skip_figures
from tests.train import toy

SHORT = ("optim.epochs=3",)
EACH = ("objective.penalty_outputs=each", "objective.adversarial_loss=class_conditional")
PATIENT = ("optim.epochs=5", "trainer.checkpoint_every=2", "optim.lr_schedule=cosine")
PATIENT += ("trainer.early_stopping={patience: 1}",)

# A single run is trained as by `modis-dist train`, several runs as a pack of a sweep.
KINDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "pairwise, penalty of the sum": ((*SHORT,),),
    "class_conditional, penalty of each": ((*SHORT, *EACH, "seed=3"),),
    "stack of pairwise, early stopping": tuple((*PATIENT, f"seed={seed}") for seed in range(3)),
    "stack of three losses, penalty of each": tuple(
        (*SHORT, "objective.penalty_outputs=each", f"objective.adversarial_loss={loss}", f"seed={seed}")
        for seed, loss in enumerate(("pairwise", "class_conditional", "published"))
    ),
}

GO, STOP, KILL = b"g", b"s", b""
INTERRUPTED = Interrupted.exit_code
Answer = Callable[[str], bytes]  # marker -> GO, STOP or KILL


@dataclass
class Tally:
    """Numbers of starts and kills, and the differences from uninterrupted trainings."""

    lives: int = 0
    kills: int = 0
    workers: int = 0  # kills of workers of a study, included in ``kills``
    stops: int = 0  # stop requests within an epoch
    runs: int = 0
    differences: list[str] = field(default_factory=list)


class Kind:
    """One kind of training: its data, the files of an uninterrupted training, and the markers that it passes."""

    def __init__(self, name: str, store: Path, folder: Path) -> None:
        self.name = name
        self.runs = [toy.run(*overrides, f"data.store={store}") for overrides in KINDS[name]]
        self.store = store
        self.folder = folder
        folder.mkdir()
        self.uninterrupted = folder / "uninterrupted"
        self.markers: list[str] = []
        self.start(self.uninterrupted, self._note)
        self._number = 0

    def _note(self, marker: str) -> bytes:
        self.markers.append(marker)
        return GO

    def interrupted(self, answer: Answer, tally: Tally) -> None:
        """Run one training to its end, restarting it after interruptions; add its differences to the tally."""
        self._number += 1
        out = self.folder / f"interrupted{self._number}"
        last = "start"

        def noted(marker: str) -> bytes:
            nonlocal last
            reply = answer(marker)
            last = last if reply == GO else marker
            return reply

        status = None
        while status != 0:
            status = self.start(out, noted)
            tally.lives += 1
            tally.kills += status == -signal.SIGKILL
            tally.stops += status == INTERRUPTED
        tally.runs += 1
        tally.differences += [
            f"{self.name}, last interrupted at {last}: {what}" for what in compared(out, self.uninterrupted)
        ]
        shutil.rmtree(out)

    def start(self, out: Path, answer: Answer) -> int:
        """Start the training in a child and reply to its markers; return the exit code, 0 if the training finished."""
        (child_reader, parent_writer), (parent_reader, child_writer) = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            os.close(parent_writer)
            os.close(parent_reader)
            train_and_exit(self.runs, self.store, out, Announcer(child_writer, child_reader))
        os.close(child_writer)
        os.close(child_reader)
        killed = False
        with os.fdopen(parent_reader, "rb", buffering=0) as stream:
            for line in iter(stream.readline, b""):
                reply = answer(line.decode().rstrip("\n"))
                if reply == KILL:
                    os.kill(child, signal.SIGKILL)
                    killed = True
                    break
                os.write(parent_writer, reply)
        os.close(parent_writer)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        expected = {-signal.SIGKILL} if killed else {0, INTERRUPTED}
        assert code in expected, f"{self.name}: a start ended with {code}"
        return code


# --- interruptions -------------------------------------------------------------------------------------------


def chain(chance: random.Random, *, share: float) -> Answer:
    """Kill a training at a fraction ``share`` of its markers, once each: every start reaches the next marker.

    At a third of the steps it is asked to stop instead, which saves within an epoch.
    """
    decided: dict[str, bytes] = {}

    def answer(marker: str) -> bytes:
        if marker in decided:
            return decided[marker]
        stopped = marker.startswith("step") and chance.random() < 1 / 3
        decided[marker] = STOP if stopped else GO
        return STOP if stopped else KILL if chance.random() < share else GO

    return answer


def once(marker: str) -> Answer:
    """Kill at one marker, the first time it is passed."""
    remaining = [marker]

    def answer(passed: str) -> bytes:
        return KILL if passed in remaining and remaining.pop() else GO

    return answer


def soak(kills: int, *, seed: int, folder: Path, store: Path, report: Callable[[Tally], None]) -> Tally:
    """Disturb trainings of every kind until ``kills`` kills are done.

    First, one training of every kind is killed at each of its markers; then trainings of alternating kinds are killed
    once, at a random marker, or at a random half of their markers. ``report`` is called after every training.
    """
    tally, chance = Tally(), random.Random(seed)
    kinds = [Kind(name, store, folder / str(number)) for number, name in enumerate(KINDS)]
    for kind, answer in _plan(kinds, chance):
        if tally.kills >= kills:
            return tally
        kind.interrupted(answer, tally)
        report(tally)
    raise AssertionError("a plan has no end")


def _plan(kinds: list[Kind], chance: random.Random) -> Iterator[tuple[Kind, Answer]]:
    yield from ((kind, chain(chance, share=1.0)) for kind in kinds)
    while True:
        for kind in kinds:
            yield from ((kind, once(chance.choice(kind.markers))) for _ in range(5))
            yield kind, chain(chance, share=0.5)


# --- comparison ---------------------------------------------------------------------------------------------


def compared(out: Path, uninterrupted: Path) -> list[str]:
    """Return the differences between the folders of two finished trainings."""
    problems = []
    for folder in sorted({p.parent.parent for p in uninterrupted.rglob("step-*")}):
        problems += differences(out / folder.relative_to(uninterrupted), folder)
    for path in (*uninterrupted.rglob("result.json"), *uninterrupted.rglob("history.json")):
        if (out / path.relative_to(uninterrupted)).read_bytes() != path.read_bytes():
            problems.append(f"{path.relative_to(uninterrupted)} is another")
    problems += [f"journal: {what}" for what in _journals(out, uninterrupted)]
    names = {p.relative_to(uninterrupted) for p in uninterrupted.rglob("*")}
    return problems + [f"{path} is left over" for p in out.rglob("*") if (path := p.relative_to(out)) not in names]


def _journals(out: Path, uninterrupted: Path) -> Iterator[str]:
    for path in uninterrupted.rglob("journal.jsonl"):
        actual, expected = journal.read(out / path.relative_to(uninterrupted)), journal.read(path)
        for kind in ("start", "metrics", "checkpoint", "end"):
            lines_of_both = [
                [_plain(record, folder) for record in records if record["kind"] == kind]
                for records, folder in ((actual, out), (expected, uninterrupted))
            ]
            if kind != "metrics":  # an event is repeated if it is unknown whether it was written
                lines_of_both = [sorted(set(lines)) for lines in lines_of_both]
            if lines_of_both[0] != lines_of_both[1]:
                yield f"{kind}: {len(lines_of_both[0])} against {len(lines_of_both[1])}, or with other values"


def _plain(record: journal.Record, folder: Path) -> str:
    values = {key: value for key, value in record.items() if key != "time_ms"}
    return json.dumps(values, sort_keys=True).replace(str(folder), "")


# --- in the child process -----------------------------------------------------------------------------------


class Announcer:
    """Report each marker and wait for the reply to continue."""

    def __init__(self, writer: int, reader: int) -> None:
        self._writer, self._reader = writer, reader

    def __call__(self, marker: str) -> bytes:
        os.write(self._writer, f"{marker}\n".encode())
        reply = os.read(self._reader, 1)
        if reply == b"":  # the parent has ended
            os._exit(1)
        return reply


class AtEveryStep:
    """A stop callback that announces optimiser steps, numbered from the start of the training."""

    def __init__(self, at: Announcer, last: Path) -> None:
        self._at = at
        newest = checkpoint.latest(last)
        self._step = checkpoint.load(newest).step if newest else 0

    def requested(self) -> str | None:
        self._step += 1
        return "stop requested" if self._at(f"step {self._step}") == STOP else None


def train_and_exit(runs: list[Run], store: Path, out: Path, at: Announcer, spec: RankSpec = ALONE) -> None:
    """Train to the end as the commands do; never returns. With several ranks, no stop is requested."""
    code = 1
    try:
        os.umask(0o077)
        _patch(at)
        fingerprint = Store.open(store).fingerprint
        if len(runs) == 1:
            stop = AtEveryStep(at, out / "last") if spec.size == 1 else NeverStop()
            single.train_run(runs[0], out=out, source="toy", reporter=NullReporter(), stop=stop, spec=spec)
        else:
            trials = [Trial(trial_id(run, fingerprint), "all", 0, {}, None, 0, run) for run in runs]
            pack = run_pack.Pack(tuple(trials), probe=False)
            if run_pack.unfinished_packs(out, [pack]):
                last = run_pack.pack_folder(out, pack) / "last"
                stop = AtEveryStep(at, last) if spec.size == 1 else NeverStop()
                run_pack.run_pack(pack, run_pack.study_layout(out, pack), store=store, stop=stop, spec=spec)
            elif spec.rank == 0:
                run_pack.remove_last_if_done(
                    run_pack.pack_folder(out, pack), [run_pack.trial_folder(out, t) for t in pack.trials]
                )
        code = 0
    except (Interrupted, RankLost) as ending:
        code = ending.exit_code
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _patch(at: Announcer) -> None:
    """Announce every phase of every write; skip slow parts without state."""
    skip_figures()
    evaluation.plain_baseline = lambda *_: None
    evaluate = evaluation.evaluate
    evaluation.evaluate = lambda *arguments, **settings: evaluate(*arguments, **settings | {"probing": None})
    _patch_checkpoints(at)
    _patch_journal(at)
    _patch_results(at)


def _patch_checkpoints(at: Announcer) -> None:
    new_folder, save_file, write_json = checkpoint.new_folder, checkpoint.save_file, checkpoint.write_json
    remove_folder, rmtree = files.remove_folder, shutil.rmtree
    target_name = [""]

    @contextmanager
    def folder(target: Path) -> Iterator[Path]:
        target_name[0] = f"{target.parents[1].name}/{target.parent.name}/{target.name}"
        at(f"{target_name[0]}: before its folder")
        with new_folder(target) as temporary:
            yield temporary
            at(f"{target_name[0]}: with its manifest, before it is renamed")
        at(f"{target_name[0]}: renamed, before its predecessors are removed")

    def half_written(tensors: object, path: Path) -> None:
        save_file(tensors, path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        at(f"{target_name[0]}: {path.name} half written")
        path.write_bytes(content)

    def json_file(path: Path, value: object) -> None:
        if path.name == "manifest.json":
            at(f"{target_name[0]}: without a manifest")
        write_json(path, value)

    def removed_after_copy(path: Path) -> None:
        """Remove the last checkpoint of a pack, after copying it for the comparison."""
        backup = path.parent / "kept" / "last"
        if path.exists() and not backup.exists():
            shutil.copytree(path, backup)
        remove_folder(path)

    def half_removed(path: Path, **settings: bool) -> None:
        if path.exists():
            next((file for file in sorted(path.rglob("*")) if file.is_file()), path / "none").unlink(missing_ok=True)
            at(f"{path.parent.name}/{path.name.split('.')[1]} half removed")
            rmtree(path, **settings)

    checkpoint.new_folder, checkpoint.save_file, checkpoint.write_json = folder, half_written, json_file
    run_pack.remove_folder = removed_after_copy
    files.shutil = SimpleNamespace(rmtree=half_removed)


def _patch_journal(at: Announcer) -> None:
    write = journal.os.write

    def half_written(file: int, line: bytes) -> int:
        record = json.loads(line)["record"]
        marker = f"journal: {record['kind']} {record.get('step', '')} of {record['trial']}"
        at(f"{marker}, before")
        end = os.lseek(file, 0, os.SEEK_END)
        write(file, line[: len(line) // 2])
        at(f"{marker}, half written")
        os.ftruncate(file, end)
        written = write(file, line)
        at(f"{marker}, after")
        return written

    journal.os = SimpleNamespace(**{name: getattr(os, name) for name in dir(os)} | {"write": half_written})


def _patch_results(at: Announcer) -> None:
    write_json = results.write_json

    def announced(path: Path, value: object) -> None:
        marker = f"{path.parent.name}/{path.name}"
        at(f"{marker}, before")
        write_json(path, value)
        at(f"{marker}, after")

    results.write_json = announced
