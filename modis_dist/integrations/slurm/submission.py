"""A study put on a cluster: what its folder keeps, and the jobs that are sent.

``DIR/submission/`` holds the study and the profile as they were, the packs in the order of their numbers, every job
that was sent, scripts, logs, and what each job says of itself. A job is written down before it is sent, with a mark by
which the queue finds it, so that nothing is ever sent twice.
"""

import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Literal

from modis_dist.config.cluster import Site, load_site
from modis_dist.config.parse import dump, load_study
from modis_dist.config.study import OptunaSearch, Study
from modis_dist.execution.resources import Cluster, Node, resource_mistakes, worker_mistakes
from modis_dist.execution.run_pack import Pack, unfinished_packs
from modis_dist.integrations.mlflow.store import checked
from modis_dist.integrations.slurm.job_notes import BEGUN
from modis_dist.integrations.slurm.job_script import LOGS, STATUS, Kind, script
from modis_dist.integrations.slurm.local_queue import LocalQueue
from modis_dist.integrations.slurm.queue import NotSeen, Queue, SlurmQueue
from modis_dist.integrations.slurm.shared_fs import warn_of_local
from modis_dist.runtime.errors import ConfigError, DataError, ModisError, UserError, shown
from modis_dist.runtime.files import write_json, write_text
from modis_dist.runtime.lock import locked
from modis_dist.runtime.version import __version__, code
from modis_dist.study import manifest
from modis_dist.study.plan import Plan, ids_of

Form = Literal["array", "allocation"]
FOLDER = "submission"


@dataclass(frozen=True)
class Sent:
    """One job that was sent, or was about to be."""

    kind: Kind
    mark: str
    first: int = 0  # of an array: its index 0 is this pack
    indices: tuple[int, ...] = ()
    number: str | None = None  # the queue's; None where it is not known whether the queue has it


@dataclass(frozen=True)
class Submission:
    """What stands in ``submission.json``."""

    study: str
    form: Form
    store: str
    packs: tuple[tuple[str, ...], ...]  # trial ids; none of an allocation, which lays them out itself
    sent: tuple[Sent, ...]
    version: str
    code: str  # digest of the program's text

    @property
    def latest(self) -> tuple[Sent, ...]:
        """The jobs that were sent last, together."""
        ends = [number for number, sent in enumerate(self.sent[:-1]) if sent.kind != "array"]
        return self.sent[ends[-1] + 1 :] if ends else self.sent

    @property
    def numbers(self) -> list[str]:
        """The numbers of all jobs that were sent."""
        return [sent.number for sent in self.sent if sent.number is not None]


# --- the folder -------------------------------------------------------------------------------------------------


def folder_of(out: Path) -> Path:
    """Where the submission of an output folder is kept."""
    return out / FOLDER


def is_submitted(out: Path) -> bool:
    """Whether a study was put on a cluster from an output folder."""
    return (folder_of(out) / "submission.json").exists()


def load(out: Path) -> Submission:
    """The submission of an output folder. Raises ``DataError`` where there is none, or it is damaged."""
    path = folder_of(out) / "submission.json"
    try:
        content = json.loads(path.read_text())
        sent = tuple(Sent(**{**each, "indices": tuple(each["indices"])}) for each in content.pop("sent"))
        packs = tuple(tuple(pack) for pack in content.pop("packs"))
        return Submission(**content, sent=sent, packs=packs)
    except FileNotFoundError:
        raise DataError(
            f"{shown(str(out))}: nothing was submitted from here; give the --out of `modis-dist submit`"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({shown(str(error))})") from None


def save(out: Path, submission: Submission) -> None:
    """Write it down."""
    write_json(folder_of(out) / "submission.json", asdict(submission))


def site_of(out: Path) -> Site:
    """The profile as it was submitted."""
    return load_site(folder_of(out) / "cluster.yaml")


def study_of(out: Path) -> Study:
    """The study as it was submitted."""
    return load_study(folder_of(out) / "study.yaml")


def packs_of(out: Path, submission: Submission) -> list[Pack]:
    """The packs of an array, by number."""
    trials = {trial.id: trial for trial in manifest.load(out / "manifest.json").trials}
    probe = study_of(out).sweep.probe
    return [Pack(tuple(trials[name] for name in pack), probe=probe) for pack in submission.packs]


def queue_of(site: Site) -> Queue:
    """Who runs the jobs of a profile."""
    return SlurmQueue() if site.executor == "slurm" else LocalQueue(site)


# --- which form -------------------------------------------------------------------------------------------------


def form_of(study: Study, site: Site, *, asked: Form | None) -> tuple[Form, str]:
    """The form of a submission, and why. Raises ``UserError`` where the one asked for cannot be."""
    together = _needs_allocation(study)
    if asked == "array" and together:
        raise UserError(f"--form array: {together}; leave --form out, or say allocation")
    if asked == "allocation" and site.executor == "local":
        raise UserError("--form allocation: there are no nodes to join on one machine; use `modis-dist tune` here")
    alone = f"a task of an array would train on one of its {site.gpus} GPUs" if site.gpus > 1 else None
    if asked == "array" and alone and site.executor == "slurm":
        raise UserError(f"--form array: {alone}; set gpus: 1 in the profile, leave --form out, or say allocation")
    if asked is not None:
        return asked, "as asked for"
    if together and site.executor == "local":
        raise UserError(f"sweep: {together}, and a local profile runs one job at a time; use `modis-dist tune` here")
    if together:
        return "allocation", together
    if site.executor == "local":
        return "array", "this machine runs one job at a time"
    if alone:
        return "allocation", alone
    trials, room = _trials(study), places(study, site)
    if trials <= room:
        return "allocation", f"its {trials} trials find room at once on {site.nodes} node(s)"
    return "array", f"its {trials} trials are more than the {room} that {site.nodes} node(s) train at once"


def places(study: Study, site: Site) -> int:
    """Packs that an allocation trains at once."""
    machine = offered(study, site, nodes=site.nodes)
    wanted = study.sweep.resources
    gpus = wanted.gpus if wanted.gpus is not None else min(1, machine.gpus)
    return max(1, machine.slots(threads=wanted.cpus or 1, gpus=gpus) // study.trainer.workers)


def slots_of(study: Study, site: Site, form: Form) -> int:
    """Packs that the jobs of a submission train at once."""
    if site.executor == "local":
        return 1
    return site.at_once if form == "array" else places(study, site)


def offered(study: Study, site: Site, *, nodes: int) -> Cluster:
    """What a profile gives to a study."""
    machine = Cluster("the profile", (Node(site.cpus, site.gpus),) * nodes)
    return machine.without_gpus() if study.trainer.device == "cpu" else machine


def check(study: Study, site: Site, *, form: Form) -> None:
    """Raise ``ConfigError`` where a study asks for what the jobs of a profile do not get, or for no usable MLflow."""
    machine, trainer = offered(study, site, nodes=site.nodes if form == "allocation" else 1), study.trainer
    resources, workers = study.sweep.resources, trainer.workers
    if workers == 1:
        problems = resource_mistakes(resources, cluster=machine)
    else:  # a pack's cores are those of its workers together
        problems = resource_mistakes(resources.model_copy(update={"cpus": None}), cluster=machine)
        threads = max(1, (resources.cpus or workers) // workers)
        problems += worker_mistakes(workers, threads=threads, device=trainer.device, cluster=machine)
    if trainer.device.startswith("cuda") and not machine.gpus:
        problems.append(f"trainer.device: {trainer.device} asked for, {machine.has('gpus')}; set gpus there")
    if trainer.precision == "fp16" and not machine.gpus:
        problems.append(f"trainer.precision: fp16 needs a GPU, {machine.has('gpus')}; set gpus there, or say bf16")
    if problems:
        raise ConfigError(problems, source=study.name)
    if study.sweep.mlflow.uri is not None:
        checked(study.sweep.mlflow.uri)


def _trials(study: Study) -> int:
    sweep = study.sweep
    configurations = sweep.search.configurations if sweep.search else prod(map(len, sweep.grid.values()))
    return configurations * max(1, len(sweep.conditions)) * sweep.folds * sweep.replicates


def _needs_allocation(study: Study) -> str | None:
    """Why the packs of a study cannot be trained as independent jobs; None where they can."""
    if isinstance(study.sweep.search, OptunaSearch):
        return "a round of sweep.search waits for all of the one before"
    if study.sweep.pruning is not None:
        return "sweep.pruning compares trainings at their rungs"
    if study.trainer.workers > 1:
        return "trainer.workers are joined by one Ray"
    return None


# --- submitting -------------------------------------------------------------------------------------------------


def refuse_if_submitted(out: Path) -> None:
    """Raise ``UserError`` where something was submitted from a folder before, or could not be."""
    if "%" in str(out):
        raise UserError(f"--out: {shown(str(out))}: Slurm reads a % in a path as a pattern; take a folder without one")
    if not is_submitted(out):
        return
    queue = queue_of(site_of(out))
    submission = adopt(out, load(out), queue)
    if submission.sent:
        refuse_if_live(out, submission, queue)
        raise UserError(
            f"{out}: was submitted before; `modis-dist status` says what became of it, `modis-dist resume` sends what "
            "is not done again; another study goes to another folder"
        )


def submit(planned: Plan, site: Site, *, form: Form, out: Path) -> Submission:
    """Put a study on a cluster. Raises ``UserError`` where that was done from this folder before, or is refused."""
    folder = folder_of(out)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(out, patience_s=0), locked(folder, patience_s=0):
        refuse_if_submitted(out)
        warn_of_local({"--out": out, "the store": planned.store.path.absolute()}, site)
        return send(out, create(planned, site, form=form, out=out), site, queue=queue_of(site))


def create(planned: Plan, site: Site, *, form: Form, out: Path) -> Submission:
    """Write down a submission of which nothing was sent yet."""
    folder = folder_of(out)
    for name in ("scripts", LOGS, STATUS):
        (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    write_text(folder / "study.yaml", dump(planned.study))
    write_text(folder / "cluster.yaml", dump(site))
    write_text(out / "study.yaml", dump(planned.study))
    packs = ids_of([pack.trials for pack in planned.packs()]) if form == "array" else ()
    manifest.save(out / "manifest.json", replace(planned.manifest, packs=packs))
    submission = Submission(
        planned.study.name, form, str(planned.store.path.absolute()), packs, (), __version__, code()
    )
    save(out, submission)
    return submission


def send(out: Path, submission: Submission, site: Site, *, queue: Queue) -> Submission:
    """Send the jobs for all that is not done, or none: where one is refused, those before it are cancelled.

    Raises what the queue raises.
    """
    packs, known = packs_of(out, submission), submission
    left = {pack.id for pack in unfinished_packs(out, packs)}
    before: list[str] = []
    try:
        for job in jobs_of(submission.form, [n for n, pack in enumerate(packs) if pack.id in left], site):
            # Chunks of an array wait for each other, or each would run as many tasks as all together are to.
            after = before if job.kind == "finish" else before[-1:]
            submission = _sent(out, submission, site, job, queue, after=after)
            before.append(str(submission.sent[-1].number))
    except UserError as error:
        queue.cancel(before)
        doubtful = load(out).sent[-1:] if isinstance(error, NotSeen) else ()  # its mark finds it
        save(out, replace(known, sent=(*known.sent, *doubtful)))
        raise UserError(f"{error}; nothing was submitted") from None
    return submission


def jobs_of(form: Form, numbers: Sequence[int], site: Site) -> list[Sent]:
    """The jobs that train packs of some numbers and end the study, in order."""
    if form == "allocation":
        return [Sent("allocation", _mark())]
    arrays = [Sent("array", _mark(), first, indices) for first, indices in chunks(numbers, site.max_array)]
    return [*arrays, Sent("finish", _mark())]


def scripts_of(planned: Plan, site: Site, *, form: Form, out: Path) -> dict[str, str]:
    """The scripts that would be sent, each once for its kind and with how many there are; warns as ``submit`` does."""
    warn_of_local({"--out": out, "the store": planned.store.path.absolute()}, site)
    packs = unfinished_packs(out, planned.packs())
    jobs = jobs_of(form, range(len(packs)), site)
    found = {}
    for kind in dict.fromkeys(job.kind for job in jobs):
        alike = [job for job in jobs if job.kind == kind]
        name = f"{kind}.sh" + (f" (the first of {len(alike)})" if len(alike) > 1 else "")
        first = alike[0]
        found[name] = script(
            site, kind=kind, name=planned.study.name, out=out, first=first.first, indices=first.indices
        )
    return found


def chunks(numbers: Sequence[int], most: int) -> list[tuple[int, tuple[int, ...]]]:
    """Ascending numbers of packs as arrays: the pack of index 0, and indices below ``most``, at most that many."""
    found: list[tuple[int, tuple[int, ...]]] = []
    for number in numbers:
        if not found or number - found[-1][0] >= most:
            found.append((number, ()))
        first, indices = found[-1]
        found[-1] = (first, (*indices, number - first))
    return found


def _sent(
    out: Path, submission: Submission, site: Site, job: Sent, queue: Queue, *, after: Sequence[str]
) -> Submission:
    """The submission with one job more."""
    text = script(site, kind=job.kind, name=submission.study, out=out, first=job.first, indices=job.indices)
    known = submission.sent
    save(out, replace(submission, sent=(*known, job)))
    number = queue.submit(text, folder=folder_of(out), mark=job.mark, tasks=job.indices, after=after)
    submission = replace(submission, sent=(*known, replace(job, number=number)))
    save(out, submission)
    return submission


def adopt(out: Path, submission: Submission, queue: Queue) -> Submission:
    """The submission with the numbers of jobs whose sender was killed before it could write them down."""
    if all(job.number is not None for job in submission.sent):
        return submission
    found = [job if job.number is not None else replace(job, number=queue.marked(job.mark)) for job in submission.sent]
    submission = replace(submission, sent=tuple(job for job in found if job.number is not None))
    save(out, submission)
    return submission


def _mark() -> str:
    return f"modis-{secrets.token_hex(8)}"


# --- afterwards -------------------------------------------------------------------------------------------------


def resume(out: Path, site: Site | None = None) -> Submission:
    """Send what is not done again, by another profile where one is given.

    Raises ``UserError`` where jobs of the submission still wait or run, ``ConfigError`` where the profile does not do.
    """
    submission = load(out)
    with locked(folder_of(out), patience_s=0):
        before = site_of(out)
        queue = queue_of(before)
        submission = adopt(out, submission, queue)
        refuse_if_live(out, submission, queue)
        if site is not None and site.executor != before.executor:
            raise UserError(f"--cluster: its executor is {site.executor}; jobs were sent to {before.executor}")
        check(study_of(out), site or before, form=submission.form)
        if site is not None:
            write_text(folder_of(out) / "cluster.yaml", dump(site))
        site = site or before
        submission = replace(submission, version=__version__, code=code())
        if submission.form == "array":  # the last job may have laid out anew what had crashed
            submission = replace(submission, packs=manifest.load(out / "manifest.json").packs)
        with _new_notes(folder_of(out) / STATUS):
            return send(out, submission, site, queue=queue)


@contextmanager
def _new_notes(folder: Path) -> Iterator[None]:
    """Without starts and reasons of the jobs before; they are there again where sending fails."""
    earlier = {path: path.read_text() for path in (*folder.glob("*.json"), *folder.glob(f"*{BEGUN}"))}
    for path in earlier:
        path.unlink()
    try:
        yield
    except ModisError:
        for path, text in earlier.items():
            write_text(path, text)
        raise


def refuse_while_live(out: Path) -> None:
    """Raise ``UserError`` where jobs of an output folder's submission still wait or run."""
    refuse_if_live(out, load(out), queue_of(site_of(out)))


def refuse_if_live(out: Path, submission: Submission, queue: Queue) -> None:
    """Raise ``UserError`` where jobs of a submission still wait or run."""
    live = [job.id for job in queue.jobs(submission.numbers).values() if job.live]
    if live:
        few = ", ".join(live[:3]) + ", ..." * (len(live) > 3)
        raise UserError(
            f"{out}: {len(live)} job(s) of it wait or run ({few}); `modis-dist status` shows them, "
            "`modis-dist cancel` ends them"
        )


def cancel(out: Path) -> list[str]:
    """Cancel the jobs of a submission that wait or run; returns their ids. What they have saved is kept."""
    submission = load(out)
    with locked(folder_of(out), patience_s=0):
        queue = queue_of(site_of(out))
        submission = adopt(out, submission, queue)
        live = [job.id for job in queue.jobs(submission.numbers).values() if job.live]
        queue.cancel([number for number in submission.numbers if any(_is_of(name, number) for name in live)])
    return live


def _is_of(name: str, number: str) -> bool:
    """Whether a job is the one with a number, or a task of its array."""
    return name == number or name.startswith(f"{number}_")
