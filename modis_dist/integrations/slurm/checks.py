"""What ``modis-dist doctor`` finds of a Slurm cluster, and whether it would take the jobs of a site profile.

Only asks, in the words of Slurm's own commands; submits nothing.
"""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modis_dist.config.cluster import Site
from modis_dist.integrations.slurm.limits import accounting_limits, limit_s, time_of
from modis_dist.integrations.slurm.slurm_commands import Told, ask, one_line, without_defaults
from modis_dist.runtime.finding import Finding, judged
from modis_dist.runtime.text import shown

PROGRAMS = ("sbatch", "squeue", "scontrol", "scancel", "srun", "sinfo")
KILL_WAIT_S = 10  # the least that a checkpoint of a cancelled job takes
MEGABYTES = {"M": 1, "G": 1024, "T": 1024**2}
OFF = "OFF"
SUSPEND = "SUSPEND"
REQUEUE = "REQUEUE"
SIGNALLED = "preempt_send_user_signal"
KEYS = {  # of the profile, by the variable of sbatch that it takes the place of
    "SBATCH_ACCOUNT": "account",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_TIMELIMIT": "time",
    "SBATCH_GRES": "gres",
    "SBATCH_MEM_PER_NODE": "memory",
}


@dataclass(frozen=True)
class NodeOffer:
    """What a node of a partition has, whoever uses it now."""

    cores: int
    megabytes: int
    gpus: str  # as sinfo writes them

    def num_gpus(self, kind: str | None) -> int:
        """Its GPUs of a kind, or of any."""
        found = re.findall(r"gpu:(?:([A-Za-z]\w*[^:,()]*):)?(\d+)", self.gpus)
        return sum(int(number) for named, number in found if kind is None or named == kind)


def cluster(site: Site | None, *, requests: Sequence[str]) -> list[Finding]:
    """All findings of the cluster; of a profile too, where there is one, with the options it gives to sbatch."""
    there = programs(wanted=site is not None)
    if there.level != "good":
        return [there]
    config = ask("scontrol", "show", "config")
    if config.error:
        return [there, _silent(config.error, wanted=site is not None)]
    settings = fields(config.text)
    found = [
        there,
        _controller(settings),
        accounting(ask("sacct", "-X", "-n", "-S", "now-1minutes")),
        requeue(settings),
    ]
    partitions = [] if site is None else asked_partitions(site)
    found += preemption(settings, [one for one in partitions if not isinstance(one, Finding)])
    found += [kill_wait(settings)]
    return found if site is None else [*found, *_limits(settings, partitions, site, requests)]


def limits(site: Site, *, requests: Sequence[str], jobs: int) -> list[Finding]:
    """Whether the cluster's queue would take so many jobs of a profile, and what it allows."""
    there, config = programs(wanted=True), ask("scontrol", "show", "config")
    if there.level != "good" or config.error:
        return [there if there.level != "good" else _silent(config.error, wanted=True)]
    return _limits(fields(config.text), asked_partitions(site), site, requests, jobs=jobs)


def _limits(
    settings: dict[str, str],
    partitions: Sequence[dict[str, str] | Finding],
    site: Site,
    requests: Sequence[str],
    *,
    jobs: int = 0,
) -> list[Finding]:
    usable = [one for one in partitions if not isinstance(one, Finding)]
    return [
        arrays(settings, site),
        *(of_partition(one, site) for one in partitions),
        *(nodes(one["PartitionName"], _offers(one["PartitionName"]), site) for one in usable),
        *accounting_limits(site, jobs=jobs),
        *ignored(os.environ, site),
        _tested(requests),
    ]


def _tested(requests: Sequence[str]) -> Finding:
    with without_defaults():  # as jobs are submitted
        return accepted(ask("sbatch", "--test-only", *requests, "--wrap=true"))


def ignored(environment: Mapping[str, str], site: Site) -> list[Finding]:
    """Variables by which sbatch would take something else, had our jobs not left them out."""
    found = []
    for name in sorted(name for name in environment if name.startswith("SBATCH_")):
        key = KEYS.get(name)
        if key is None or not getattr(site, key):
            advice = f"say it by {key or 'options'} in the profile, if jobs need it"
            said = f"{name}={shown(environment[name])} has no effect on our jobs"
            found.append(Finding("environment", "warning", said, advice))
    return found


def programs(*, wanted: bool) -> Finding:
    """Whether Slurm's commands are here."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    found = f"{', '.join(missing)} not on PATH" if missing else f"{', '.join(PROGRAMS)} are there"
    advice = "go to a login node of the cluster, or load its module (`module load slurm`)"
    return judged("Slurm's commands", found, unless=not missing, advice=advice, level="bad" if wanted else "warning")


def fields(text: str) -> dict[str, str]:
    """The settings that ``scontrol show config`` prints, one a line."""
    found = (line.partition("=") for line in text.splitlines())
    return {name.strip(): value.strip() for name, equals, value in found if equals}


def _silent(error: str, *, wanted: bool) -> Finding:
    advice = (
        "nothing else about the cluster can be told now: try again later; if it stays so, ask the site whether "
        "slurmctld runs, and whether munge and the clock of this machine are right"
    )
    return Finding("controller", "bad" if wanted else "warning", error, advice)


def _controller(settings: dict[str, str]) -> Finding:
    version, name = (settings.get(key, "unknown") for key in ("SLURM_VERSION", "ClusterName"))
    return Finding("controller", "good", shown(f"cluster {name} answers, Slurm {version}"))


def accounting(told: Told) -> Finding:
    """Whether it can be told how jobs ended that squeue has forgotten."""
    advice = "of jobs that ended it cannot be told how, but for what they wrote themselves; look into their logs"
    return judged("accounting", told.error or "sacct answers", unless=not told.error, advice=advice, level="warning")


def requeue(settings: dict[str, str]) -> Finding:
    """Whether a job that was preempted or lost its node runs again by itself."""
    value = settings.get("JobRequeue", "unknown")
    advice = (
        "our jobs ask for --requeue themselves, which goes before this; should the site forbid that, start again by "
        "hand what was preempted"
    )
    return judged("requeue", f"JobRequeue={shown(value)}", unless=value == "1", advice=advice, level="warning")


def preemption(settings: dict[str, str], partitions: Sequence[dict[str, str]]) -> list[Finding]:
    """Whether a job hears before it is preempted, on each partition of the profile."""
    kind = settings.get("PreemptType", "").removeprefix("preempt/").removeprefix("(null)")
    modes = settings.get("PreemptMode", OFF)
    if kind in {"", "none"} or modes == OFF:
        return [Finding("preemption", "good", "off: a job that runs is left alone")]
    signalled = SIGNALLED in settings.get("SlurmctldParameters", "")
    if kind == "qos":
        return [_by_qos(modes, signalled=signalled)]
    if not partitions:
        return [_preemption("preemption", modes, signalled=signalled, grace="")]
    return [
        _preemption(f"preemption on {one['PartitionName']}", one.get("PreemptMode", modes), signalled, one["GraceTime"])
        for one in partitions
    ]


def _preemption(what: str, mode: str, signalled: bool, grace: str) -> Finding:
    """``grace`` is the GraceTime of a partition, empty where none is known."""
    if mode == OFF or SUSPEND in mode:
        return Finding(what, "good", "off: a job that runs is left alone" if mode == OFF else "jobs are suspended only")
    found = f"{mode}, {'' if signalled else 'without '}{SIGNALLED}" + (f", GraceTime={grace} s" if grace else "")
    missing = [] if signalled else [f"SlurmctldParameters={SIGNALLED}"]
    missing += ["GraceTime of a minute"] if grace == "0" else []
    advice = []
    if missing:
        advice += [
            "a preempted job is not told in time, and loses what it did since its last checkpoint: ask the site for "
            + " and ".join(missing)
        ]
    if REQUEUE not in mode:
        advice += ["a preempted job is not queued again by Slurm: give the same command again"]
    return judged(what, shown(found), unless=not advice, advice="; ".join(advice), level="warning")


def _by_qos(mode: str, *, signalled: bool) -> Finding:
    found = f"{mode} by quality of service, {'' if signalled else 'without '}{SIGNALLED}"
    advice = "see that `sacctmgr show qos format=name,preemptmode,gracetime` has a GraceTime above 0 for yours"
    if not signalled:
        advice = f"ask the site for SlurmctldParameters={SIGNALLED}, or jobs lose what they did since a checkpoint"
    return Finding("preemption", "warning", shown(found), advice)


def kill_wait(settings: dict[str, str]) -> Finding:
    """How long a job that is cancelled has to save."""
    told = settings.get("KillWait", "").split(" ")[0]
    found = f"{told or 'unknown'} s between SIGTERM and SIGKILL"
    enough = told.isdecimal() and int(told) >= KILL_WAIT_S
    advice = "a job that is cancelled may lose what it did since its last checkpoint; warnings before time limits hold"
    return judged("KillWait", found, unless=enough, advice=advice, level="warning")


def arrays(settings: dict[str, str], site: Site) -> Finding:
    """Whether the longest arrays of the profile fit."""
    told = settings.get("MaxArraySize", "")
    found = f"max_array {site.max_array}, MaxArraySize={told or 'unknown'}"
    if not told.isdecimal():
        return Finding("arrays", "good", found)
    most = int(told) - 1
    advice = f"set max_array: {most} in the profile" if most > 0 else "this cluster takes no arrays; set nodes instead"
    return judged("arrays", found, unless=site.max_array <= most, advice=advice)


def asked_partitions(site: Site) -> list[dict[str, str] | Finding]:
    """What Slurm tells of each partition the profile names, or of the default one; a finding where there is none."""
    if site.partition is not None:
        return [_partition(name) for name in site.partition.split(",")]
    told = ask("scontrol", "--oneliner", "show", "partition")
    all_of_them = [_words(line) for line in told.text.splitlines() if "PartitionName=" in line]
    default = [one for one in all_of_them if one.get("Default") == "YES"]
    names = ", ".join(one["PartitionName"] for one in all_of_them)
    advice = f"name one by the profile's partition: {shown(names)}"
    return [*default] or [Finding("partition", "bad", told.error or "the cluster has no default one", advice)]


def _partition(name: str) -> dict[str, str] | Finding:
    told = ask("scontrol", "--oneliner", "show", "partition", name)
    if told.error or "PartitionName=" not in told.text:
        advice = "set the profile's partition to one of those that `sinfo -s` lists"
        return Finding(f"partition {name}", "bad", told.error or "Slurm knows no such partition", advice)
    return _words(told.text)


def _words(line: str) -> dict[str, str]:
    """The settings of a line of ``scontrol``, set apart by blanks."""
    return {name: value for name, equals, value in (word.partition("=") for word in line.split()) if equals}


def of_partition(told: dict[str, str] | Finding, site: Site) -> Finding:
    """Whether a partition is open for jobs of the profile's length and number of nodes."""
    if isinstance(told, Finding):
        return told
    longest, most, held = (told.get(key, "") for key in ("MaxTime", "MaxNodes", "TotalNodes"))
    problems = []
    if told.get("State") != "UP":
        problems += ["it takes no jobs now: wait, or name another by the profile's partition"]
    if (limit := limit_s(longest)) is not None and site.seconds > limit:
        problems += [f"time {site.time} is longer than MaxTime: set time: {time_of(limit)} at most"]
    for number, of in ((most, "MaxNodes"), (held, "TotalNodes")):
        if number.isdecimal() and site.nodes > int(number):
            problems += [f"nodes {site.nodes} is more than {of}: set nodes: {number} at most"]
    found = shown(f"{told.get('State')}, {held} nodes, MaxTime={longest}, MaxNodes={most}")
    name = f"partition {told['PartitionName']}"
    return judged(name, found, unless=not problems, advice="; ".join(problems))


def _offers(partition: str) -> list[NodeOffer] | str:
    """The nodes of a partition; in words why they are not known."""
    told = ask("sinfo", "-h", "-N", "-p", partition, "-o", "%c|%m|%G")
    if told.error:
        return told.error
    lines = (line.split("|", 2) for line in told.text.splitlines() if line.count("|") >= 2)
    return [NodeOffer(_number(cores), _number(megabytes), gpus) for cores, megabytes, gpus in lines]


def _number(told: str) -> int:
    """sinfo writes 16+ where it means at least."""
    return int(re.sub(r"\D", "", told) or 0)


def nodes(partition: str, offers: list[NodeOffer] | str, site: Site) -> Finding:
    """Whether enough nodes of a partition have what the profile asks of one, all of it at once."""
    what, asked = f"nodes of {partition}", _asked(site)
    if isinstance(offers, str):
        return Finding(what, "warning", offers, "whether they have what the profile asks for is not known")
    fitting = sum(
        node.cores >= site.cpus
        and node.num_gpus(site.gpu_kind) >= site.gpus
        and node.megabytes >= megabytes(site.memory)
        for node in offers
    )
    cores, gpus = max((one.cores for one in offers), default=0), max((one.num_gpus(None) for one in offers), default=0)
    most = f"{cores} cores, {gpus} GPUs and {max((one.megabytes for one in offers), default=0)}M of memory"
    kinds = ", ".join(sorted({node.gpus for node in offers if node.gpus != "(null)"}))
    told = f"{most}{f' ({shown(kinds)})' if kinds else ''}"
    advice = f"ask for less in the profile, or name another partition; nodes here have up to {told}"
    found = f"{fitting} of {len(offers)} have {asked}, {site.nodes} needed"
    return judged(what, found, unless=fitting >= site.nodes, advice=advice)


def _asked(site: Site) -> str:
    parts = [f"{site.cpus} cores"]
    parts += [f"{site.gpus} GPU(s){f' of kind {site.gpu_kind}' if site.gpu_kind else ''}"] if site.gpus else []
    parts += [site.memory] if site.memory else []
    return " and ".join(parts)


def megabytes(memory: str | None) -> int:
    """Of memory as a profile writes it; 0 where it asks for none."""
    return int(memory[:-1]) * MEGABYTES[memory[-1]] if memory else 0


def accepted(told: Told) -> Finding:
    """Whether the cluster would take a job of the profile."""
    advice = "mend the profile (partition, account, qos, options, time): a job of it would be refused like this"
    return judged("a job", told.error or one_line(told.remark, "sbatch"), unless=not told.error, advice=advice)
