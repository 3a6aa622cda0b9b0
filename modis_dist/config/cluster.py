"""A site profile: where and how jobs run on one cluster. Pure data, as ``cluster/*.yaml`` state it."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from modis_dist.config import yaml12
from modis_dist.config.messages import mistakes
from modis_dist.config.run import Section, item
from modis_dist.runtime.errors import ConfigError
from modis_dist.runtime.text import shown

# [days-]hours:minutes:seconds, as sbatch takes it; a bare number of minutes would be read as seconds by others.
# Digits are those of ASCII: `\d` would take Arabic ones, which int() reads and sbatch does not.
TIME = re.compile(r"(?:(?P<days>[0-9]{1,3})-)?(?P<hours>[0-9]{1,3}):(?P<minutes>[0-5][0-9]):(?P<seconds>[0-5][0-9])")
MEMORY = r"[1-9][0-9]{0,8}[MGT]"
WORD = r"[A-Za-z0-9\[][A-Za-z0-9_.,:=+@&|*\[\]-]*"  # of a value of sbatch: no blank, quote or `$`
GRES = r"(?!gpu:)[A-Za-z][A-Za-z0-9_-]*(:[A-Za-z][A-Za-z0-9_-]*)?:[0-9]+[KMGT]?"
OPTION = r"--[a-z][a-z-]*(=[A-Za-z0-9_.,:=+@&|*\[\]/%-]+)?"
VARIABLE = r"\$(?:[A-Za-z_][A-Za-z0-9_]*|\{[A-Za-z_][A-Za-z0-9_]*\})"
SCRATCH = rf"(?:/|{VARIABLE})(?:[A-Za-z0-9_./-]|{VARIABLE})*"  # variables of the shell, but none of its commands
REPLACE = "CHANGE_ME"  # what a shipped profile holds where only the user knows the value
OURS = (  # options that profiles state by a key, or that a submission depends on
    *("account", "array", "chdir", "clusters", "comment", "constraint", "cpus-per-gpu", "cpus-per-task", "dependency"),
    *("error", "export", "export-file", "gid", "gpus", "gpus-per-node", "gpus-per-task", "gres", "help", "input"),
    *("job-name", "kill-on-invalid-dep", "mem", "no-requeue", "nodes", "ntasks", "ntasks-per-node", "open-mode"),
    *("output", "parsable", "partition", "qos", "requeue", "signal", "test-only", "time", "uid", "usage", "version"),
    *("wait", "wrap"),
)


def _text(pattern: str, wanted: str) -> AfterValidator:
    """Refuses text that a pattern does not match whole, in words that need no pattern."""

    def checked(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"must be {wanted} (got '{shown(value)}')")
        return value

    return AfterValidator(checked)


Word = Annotated[str, Field(max_length=200), _text(WORD, "one word of letters, digits and _.,:=+@&|*[]-")]
Memory = Annotated[str, _text(MEMORY, "a whole number with M, G or T, e.g. 16G")]
Gres = Annotated[str, Field(max_length=200), _text(GRES, "name:number or name:kind:number, e.g. lscratch:100")]
Option = Annotated[str, Field(max_length=200), _text(OPTION, "one long option of sbatch, --name or --name=value")]
Scratch = Annotated[
    str,
    Field(max_length=500),
    _text(SCRATCH, "a path that starts with / or a variable, e.g. $JOBSCRATCH, without blanks, quotes or commands"),
]
Line = Annotated[str, Field(min_length=1, max_length=2000)]


class Site(Section):
    """One way of running jobs on one cluster."""

    executor: Literal["slurm", "local"] = item(
        "slurm", "slurm submits with sbatch; local runs the same jobs, one after the other, on this machine"
    )
    partition: Word | None = item(None, "partition (queue); the cluster's default where none is given")
    account: Word | None = item(None, "account or project that is charged")
    qos: Word | None = item(None, "quality of service")
    constraint: Word | None = item(None, "feature that nodes must have")
    cpus: int = item(4, "cores of an array's task, or of each node of an allocation", ge=1, le=4096)
    gpus: int = item(0, "GPUs of an array's task, or of each node of an allocation", ge=0, le=64)
    gpu_kind: Word | None = item(None, "kind of GPU as the site calls it, e.g. v100; any where none is given")
    gres: tuple[Gres, ...] = item((), "other generic resources of a node, name:number, e.g. lscratch:100")
    memory: Memory | None = item(
        None, "memory of an array's task, or of each node of an allocation, e.g. 16G; the site's default where none"
    )
    time: str = item("04:00:00", "time limit of a job, [days-]hours:minutes:seconds; at the limit it is queued again")
    warning_s: int = item(
        120, "seconds before the time limit at which a job is told to save and queued again", unit="s", ge=10, le=3600
    )
    requeues: int = item(
        20, "times that a job may be queued again after a time limit, a preemption or a lost node", ge=0, le=1000
    )
    nodes: int = item(1, "nodes of an allocation; several are joined to one Ray", ge=1, le=1000)
    at_once: int = item(10, "tasks of an array that run at the same time", ge=1, le=100_000)
    max_array: int = item(
        1000, "tasks of one array at most, `scontrol show config | grep MaxArraySize` less one; more are split", ge=1
    )
    options: tuple[Option, ...] = item((), "further options of sbatch, e.g. --hint=nomultithread")
    setup: tuple[Line, ...] = item((), "lines of shell before the program starts: module load, source of a venv")
    python: tuple[Line, ...] | None = item(
        None, "words that start Python in a job, e.g. [singularity, exec, my.sif, python]; this Python where none"
    )
    scratch: Scratch | None = item(
        None, "folder for temporary files on a node, e.g. $JOBSCRATCH; /tmp where none is given"
    )

    @field_validator("time", mode="before")
    @classmethod
    def _of_slurm(cls, value: object) -> str:
        if not isinstance(value, str) or not TIME.fullmatch(value) or not _seconds(value):
            raise ValueError(f"must be [days-]hours:minutes:seconds, above 0 (got {shown(value)})")
        return value

    @field_validator("options")
    @classmethod
    def _not_ours(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for option in value:
            name = option.removeprefix("--").partition("=")[0]
            if any(ours.startswith(name) for ours in OURS):  # sbatch takes the start of a name for the name
                raise ValueError(f"--{name} is set by a key of the profile, or by the submission itself")
        return value

    @field_validator("setup", "python")
    @classmethod
    def _single_lines(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for line in value or ():
            if not line.isprintable():
                raise ValueError("each must be one line of printable characters")
            if line.lstrip().startswith("#SBATCH"):
                raise ValueError("#SBATCH is not for here; write the option below options")
        return value

    @field_validator("python")
    @classmethod
    def _some(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and not value:
            raise ValueError("needs at least one word; leave the key out for this Python")
        return value

    @field_validator("*")
    @classmethod
    def _replaced(cls, value: Any) -> Any:
        """Profiles are shipped half filled in: what only the user knows must not reach the cluster as it is."""
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and REPLACE in text:
                raise ValueError(f"write your own value for {REPLACE} (got '{shown(text)}'), or take the line out")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> "Site":
        if self.gpu_kind is not None and not self.gpus:
            raise ValueError("gpu_kind: needs gpus of 1 or more")
        if self.warning_s >= self.seconds:
            raise ValueError(f"warning_s: must be shorter than time ({self.time})")
        if self.executor == "local" and self.nodes > 1:
            raise ValueError("nodes: a local profile has one, this machine")
        return self

    @property
    def seconds(self) -> int:
        """The time limit."""
        return _seconds(self.time)


def _seconds(time: str) -> int:
    found = TIME.fullmatch(time)
    assert found is not None, "checked before"
    parts = {name: int(value or 0) for name, value in found.groupdict().items()}
    return ((parts["days"] * 24 + parts["hours"]) * 60 + parts["minutes"]) * 60 + parts["seconds"]


class Explained(Section):
    """The profile as a section, so that its keys are explained under the name ``cluster``."""

    cluster: Site = item(Site(), "where and how jobs run on one cluster: a file of its own, see cluster/README.md")


def load_site(path: Path) -> Site:
    """The profile in a YAML file. Raises ``ConfigError`` with every mistake."""
    try:
        return Site.model_validate(yaml12.read(path))
    except ValidationError as error:
        raise ConfigError(mistakes(Site, error), source=str(path)) from None
