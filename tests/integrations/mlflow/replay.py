"""Replay of a finished study: its run folder is written again step by step, as by a driver and its trainings."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modis_dist.integrations.mlflow import store as mlflow_store
from modis_dist.integrations.mlflow.sync import write_state
from modis_dist.train.journal import Record, read
from tests.integrations.mlflow.mlflow_tables import curves, expected, parent_and_trials

STUDY_ID = "0123456789abcdef"
DRIVER = """import sys
from pathlib import Path
from modis_dist.runtime.lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


class Replay:
    """Writes the files of ``source`` into ``folder``, stage by stage."""

    def __init__(self, source: Path, folder: Path, *, database: Path | None = None, study_id: str = STUDY_ID) -> None:
        self.source, self.folder, self.study_id = source, folder, study_id
        self.database = folder / mlflow_store.DATABASE
        self.uri = mlflow_store.default_uri(folder)
        folder.mkdir(mode=0o700)
        if database is not None:
            shutil.copyfile(database, self.database)
        shutil.copy2(source / "study.yaml", folder)
        listed = json.loads((source / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(listed | {"refit_packs": []}))
        write_state(folder, study_id=study_id)
        self.search = [trial["id"] for trial in listed["trials"]]
        self.refits = [name for pack in listed["refit_packs"] for name in pack]

    def epochs(self, last: int, trials: list[str] | None = None) -> None:
        """Append the records of search trials (or these) up to an epoch to their journals."""
        chosen = self.search if trials is None else trials
        for journal in self.source.glob("packs/*/journal.jsonl"):
            copy = self.folder / journal.relative_to(self.source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            written = copy.read_bytes() if copy.exists() else b""
            with copy.open("ab") as file:
                for line in journal.read_bytes().splitlines(keepends=True):
                    record = json.loads(line)["record"]
                    if record["trial"] in chosen and record.get("step", last) <= last and line not in written:
                        file.write(line)

    def journal(self, name: str) -> Path:
        """Return the journal of the pack that trains a trial."""
        return next(
            path for path in self.folder.glob("packs/*/journal.jsonl") if any(r["trial"] == name for r in read(path))
        )

    def results(self, trials: list[str]) -> None:
        """Finish trials: the rest of their journals and their folders."""
        self.epochs(10**9, trials)
        for name in trials:
            shutil.copytree(self.source / "trials" / name, self.folder / "trials" / name, dirs_exist_ok=True)

    def refit(self) -> None:
        """Begin the refits: the manifest names them, and each has its settings."""
        shutil.copy2(self.source / "manifest.json", self.folder)
        for name in self.refits:
            (self.folder / "trials" / name).mkdir(parents=True)
            shutil.copy2(self.source / "trials" / name / "run.yaml", self.folder / "trials" / name)

    def finish(self) -> None:
        """Write everything that is still missing, the summary last."""
        if not (self.folder / "trials" / self.refits[0]).exists():
            self.refit()
        self.results([*self.search, *self.refits])
        shutil.copytree(self.source / "model", self.folder / "model")
        for name in ("report.md", "sweep.png", "summary.json"):
            shutil.copy2(self.source / name, self.folder)

    def assert_complete(self, database: Path | None = None) -> None:
        """Assert that MLflow has every metric of every epoch once, under one parent run, and nothing else."""
        _, trials = parent_and_trials(database or self.database, self.study_id)
        records = self.records()
        assert set(trials) == set(records)
        for name, run in trials.items():
            assert curves(database or self.database, run.id) == expected(records[name])

    def records(self) -> dict[str, list[Record]]:
        """Return the metric records of the journals by trial."""
        records = [record for path in self.folder.glob("packs/*/journal.jsonl") for record in read(path)]
        metrics = [record for record in records if record["kind"] == "metrics"]
        return {
            name: [record for record in metrics if record["trial"] == name] for name in {r["trial"] for r in metrics}
        }


@contextmanager
def driver(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """Start a process that holds the lock of a run folder until its standard input is closed."""
    command = [sys.executable, "-c", DRIVER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            assert process.stdout.readline() == "locked\n"
            yield process
            process.stdin.close()
            process.wait(60)
        finally:
            process.kill()
