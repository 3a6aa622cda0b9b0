"""Record of a submission in its output folder.

``DIR/submission/`` holds the study and the profile as submitted, trial ids of the packs by number, every job that was
sent, scripts, logs, and a status file per job.
"""

import json
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path

from modis_dist.config.cluster import Site, load_site
from modis_dist.config.parse import load_study
from modis_dist.config.study import Study
from modis_dist.execution.run_pack import Pack
from modis_dist.integrations.slurm.folder import PROFILE, RECORD, STUDY, folder_of
from modis_dist.integrations.slurm.form import Form
from modis_dist.integrations.slurm.job_script import Kind
from modis_dist.integrations.slurm.local_queue import LocalQueue
from modis_dist.integrations.slurm.queue import Queue, SlurmQueue
from modis_dist.runtime.errors import DataError
from modis_dist.runtime.files import write_json
from modis_dist.runtime.text import shown
from modis_dist.study import manifest


@dataclass(frozen=True)
class SentJob:
    """A job that was sent, or was about to be sent."""

    kind: Kind
    mark: str = field(default_factory=lambda: f"modis-{secrets.token_hex(8)}")  # the queue finds the job by it
    first: int = 0  # of an array: the pack of index 0
    indices: tuple[int, ...] = ()
    number: str | None = None  # job id of the queue; None if it is unknown whether the queue has the job


@dataclass(frozen=True)
class Submission:
    """Content of ``submission.json``."""

    study: str
    form: Form
    store: str
    packs: tuple[tuple[str, ...], ...]  # trial ids; empty for an allocation, which arranges its packs itself
    sent: tuple[SentJob, ...]
    version: str
    code: str  # digest of the source code

    @property
    def latest(self) -> tuple[SentJob, ...]:
        """Jobs of the last submit or resume."""
        ends = [number for number, job in enumerate(self.sent[:-1]) if job.kind != "array"]
        return self.sent[ends[-1] + 1 :] if ends else self.sent

    @property
    def numbers(self) -> list[str]:
        """Ids of all jobs."""
        return [job.number for job in self.sent if job.number is not None]


def load(out: Path) -> Submission:
    """Return the submission of an output folder. Raises ``DataError`` if there is none or its file is damaged."""
    path = folder_of(out) / RECORD
    try:
        content = json.loads(path.read_text())
        sent = tuple(SentJob(**{**job, "indices": tuple(job["indices"])}) for job in content.pop("sent"))
        packs = tuple(tuple(pack) for pack in content.pop("packs"))
        return Submission(**content, sent=sent, packs=packs)
    except FileNotFoundError:
        raise DataError(
            f"{shown(str(out))}: no submission in this folder; give the --out of `modis-dist submit`"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({shown(str(error))})") from None


def save(out: Path, submission: Submission) -> None:
    """Write ``submission.json``."""
    write_json(folder_of(out) / RECORD, asdict(submission))


def site_of(out: Path) -> Site:
    """Return the profile as submitted."""
    return load_site(folder_of(out) / PROFILE)


def study_of(out: Path) -> Study:
    """Return the study as submitted."""
    return load_study(folder_of(out) / STUDY)


def packs_of(out: Path, submission: Submission) -> list[Pack]:
    """Return the packs of an array by number."""
    trials = {trial.id: trial for trial in manifest.load(out / manifest.FILE).trials}
    probe = study_of(out).sweep.probe
    return [Pack(tuple(trials[name] for name in pack), probe=probe) for pack in submission.packs]


def queue_of(site: Site) -> Queue:
    """Return the queue that runs the jobs of a profile."""
    return SlurmQueue() if site.executor == "slurm" else LocalQueue(site)
