"""Site profile: the settings of jobs on one cluster, as in ``cluster/*.yaml``."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from modis_dist.config import yaml12
from modis_dist.config.messages import mistakes
from modis_dist.config.run import Section, item
from modis_dist.runtime.errors import ConfigError
from modis_dist.runtime.text import shown

# [days-]hours:minutes:seconds as in sbatch; a bare number is ambiguous (minutes or seconds).
# ASCII digits: `\d` also matches other digits, which int() accepts and sbatch does not.
TIME = re.compile(r"(?:(?P<days>[0-9]{1,3})-)?(?P<hours>[0-9]{1,3}):(?P<minutes>[0-5][0-9]):(?P<seconds>[0-5][0-9])")
MEMORY = r"[1-9][0-9]{0,8}[MGT]"
WORD = r"[A-Za-z0-9\[][A-Za-z0-9_.,:=+@&|*\[\]-]*"  # a value of an sbatch option: no blank, quote or `$`
GRES = r"(?!gpu:)[A-Za-z][A-Za-z0-9_-]*(:[A-Za-z][A-Za-z0-9_-]*)?:[0-9]+[KMGT]?"
OPTION = r"--[a-z][a-z-]*(=[A-Za-z0-9_.,:=+@&|*\[\]/%-]+)?"
VARIABLE = r"\$(?:[A-Za-z_][A-Za-z0-9_]*|\{[A-Za-z_][A-Za-z0-9_]*\})"
SCRATCH = rf"(?:/|{VARIABLE})(?:[A-Za-z0-9_./-]|{VARIABLE})*"  # shell variables, no shell commands
REPLACE = "CHANGE_ME"  # placeholder in shipped profiles
RESERVED_OPTIONS = (  # options set by a key of the profile or by the submission itself
    *("account", "array", "chdir", "clusters", "comment", "constraint", "cpus-per-gpu", "cpus-per-task", "dependency"),
    *("error", "export", "export-file", "gid", "gpus", "gpus-per-node", "gpus-per-task", "gres", "help", "input"),
    *("job-name", "kill-on-invalid-dep", "mem", "no-requeue", "nodes", "ntasks", "ntasks-per-node", "open-mode"),
    *("output", "parsable", "partition", "qos", "requeue", "signal", "test-only", "time", "uid", "usage", "version"),
    *("wait", "wrap"),
)


def _text(pattern: str, expected: str) -> AfterValidator:
    """Return a validator for text that matches a pattern, which the message describes as ``expected``."""

    def checked(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"must be {expected} (got '{shown(value)}')")
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
        "slurm", "slurm: submit with sbatch; local: run the same jobs one by one on this machine"
    )
    partition: Word | None = item(None, "partition; default: the cluster's default partition")
    account: Word | None = item(None, "account (project) to charge")
    qos: Word | None = item(None, "quality of service")
    constraint: Word | None = item(None, "required node features")
    cpus: int = item(4, "CPU cores per array task, or per node of an allocation", ge=1, le=4096)
    gpus: int = item(0, "GPUs per array task, or per node of an allocation", ge=0, le=64)
    gpu_kind: Word | None = item(None, "GPU type in the site's notation, e.g. v100; default: any")
    gres: tuple[Gres, ...] = item((), "other generic resources per node, name:number, e.g. lscratch:100")
    memory: Memory | None = item(
        None, "memory per array task, or per node of an allocation, e.g. 16G; default: the site's"
    )
    time: str = item(
        "04:00:00", "time limit of a job, [days-]hours:minutes:seconds; a job that reaches it saves and is requeued"
    )
    warning_s: int = item(
        120, "time before the limit at which Slurm signals a job to save and requeue", unit="s", ge=10, le=3600
    )
    requeues: int = item(
        20, "maximum requeues of a job after time limits, preemptions and node failures", ge=0, le=1000
    )
    nodes: int = item(1, "nodes of an allocation; several nodes form one Ray cluster", ge=1, le=1000)
    array_parallelism: int = item(10, "array tasks that run at the same time", ge=1, le=100_000)
    max_array: int = item(
        1000, "maximum tasks per array, MaxArraySize of `scontrol show config` minus 1; larger ones are split", ge=1
    )
    options: tuple[Option, ...] = item((), "additional options of sbatch, e.g. --hint=nomultithread")
    setup: tuple[Line, ...] = item(
        (), "shell lines before Python starts, e.g. module load, activation of an environment"
    )
    python: tuple[Line, ...] | None = item(
        None,
        "command that starts Python in a job, e.g. [singularity, exec, my.sif, python]; default: the submitting Python",
        min_length=1,
    )
    scratch: Scratch | None = item(None, "folder for temporary files on a node, e.g. $JOBSCRATCH; default: /tmp")

    @field_validator("time", mode="before")
    @classmethod
    def _valid_time(cls, value: object) -> str:
        if not isinstance(value, str) or not TIME.fullmatch(value) or not _seconds(value):
            raise ValueError(f"must be [days-]hours:minutes:seconds, above 0 (got {shown(value)})")
        return value

    @field_validator("options")
    @classmethod
    def _not_reserved(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for option in value:
            name = option.removeprefix("--").partition("=")[0]
            if any(reserved.startswith(name) for reserved in RESERVED_OPTIONS):  # sbatch accepts abbreviations
                raise ValueError(f"--{name} is set by a key of the profile or by the submission itself; remove it")
        return value

    @field_validator("setup", "python")
    @classmethod
    def _single_lines(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for line in value or ():
            if not line.isprintable():
                raise ValueError("each must be one line of printable characters")
            if line.lstrip().startswith("#SBATCH"):
                raise ValueError("#SBATCH has no effect here; put the option in options")
        return value

    @field_validator("*")
    @classmethod
    def _without_placeholder(cls, value: Any) -> Any:
        """Refuse the placeholder of shipped profiles."""
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and REPLACE in text:
                raise ValueError(f"replace {REPLACE} with your value (got '{shown(text)}'), or remove the line")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "Site":
        if self.gpu_kind is not None and not self.gpus:
            raise ValueError("gpu_kind: requires gpus of 1 or more")
        if self.warning_s >= self.seconds:
            raise ValueError(f"warning_s: must be shorter than time ({self.time})")
        if self.executor == "local" and self.nodes > 1:
            raise ValueError("nodes: must be 1 for a local profile")
        return self

    @property
    def seconds(self) -> int:
        """Time limit in seconds."""
        return _seconds(self.time)


def _seconds(time: str) -> int:
    match = TIME.fullmatch(time)
    assert match is not None, "validated before"
    parts = {name: int(value or 0) for name, value in match.groupdict().items()}
    return ((parts["days"] * 24 + parts["hours"]) * 60 + parts["minutes"]) * 60 + parts["seconds"]


class Explained(Section):
    """Section for `config --explain cluster`."""

    cluster: Site = item(Site(), "how jobs run on one cluster; in a separate file, see cluster/README.md")


def load_site(path: Path) -> Site:
    """Return the profile in a YAML file. Raises ``ConfigError`` that lists every mistake."""
    try:
        return Site.model_validate(yaml12.read(path))
    except ValidationError as error:
        raise ConfigError(mistakes(Site, error), source=str(path)) from None
