"""What Slurm's accounting allows the user of a site profile: jobs in the queue, time, cores and GPUs at once.

Of an account (an association) and of a quality of service, be it the profile's or that of the account by default.
"""

import getpass
import os
import re
from collections.abc import Mapping

from modis_dist.config.cluster import Site
from modis_dist.integrations.slurm.slurm_commands import Told, ask
from modis_dist.runtime.finding import Finding, judged
from modis_dist.runtime.text import shown

UNLIMITED = frozenset({"UNLIMITED", "INFINITE"})
IN_QUEUE = "jobs in the queue"
OF_ACCOUNT = ("Account", "MaxSubmitJobs", "DefaultQOS")
OF_QOS = ("Name", "MaxSubmitJobsPU", "MaxWall", "MaxTRESPU", "MaxTRES")
ASK = ("sacctmgr", "--noheader", "--parsable2", "show")


def accounting_limits(site: Site, *, jobs: int = 0) -> list[Finding]:
    """Whether the user may have so many jobs more of a profile, and what one of them asks for."""
    accounts = ask(*ASK, "assoc", f"format={','.join(OF_ACCOUNT)}", f"user={getpass.getuser()}")
    qos = _qos(site, accounts)
    return [*([of_qos(qos, site)] if qos else []), *([in_queue(accounts, qos, site, jobs=jobs)] if jobs else [])]


def in_queue(accounts: Told, qos: Mapping[str, str], site: Site, *, jobs: int) -> Finding:
    """Whether the user may have so many jobs more in the queue, every task of an array counted."""
    live = len(ask("squeue", "-h", "-r", "-u", str(os.getuid()), "-o", "%i").text.split())
    found = f"{jobs} job(s) and tasks" + (f" and {live} that are there" if live else "")
    if accounts.error:
        return Finding(IN_QUEUE, "good", f"{found}; a limit is not known (sacctmgr: {accounts.error})")
    known = [(int(most), "MaxSubmitJobs of the account") for most in _own(accounts, site, "MaxSubmitJobs")]
    if most := qos.get("MaxSubmitJobsPU"):
        known.append((int(most), f"MaxSubmitJobsPU of {qos['Name']}"))
    if not known:
        return Finding(IN_QUEUE, "good", f"{found}; no limit of the account")
    least, name = min(known)
    advice = "a submission would be refused: wait for others to end, ask for --form allocation, or split the study"
    return judged(IN_QUEUE, f"{found}, {name} is {least}", unless=jobs + live <= least, advice=advice)


def of_qos(told: Mapping[str, str], site: Site) -> Finding:
    """Whether a quality of service lets a job of the profile run so long, with so much, and so many at once."""
    what, problems = "quality of service", []
    limits = ", ".join(f"{key}={told[key]}" for key in OF_QOS[1:] if told[key])
    found = shown(f"{told['Name']}: {limits or 'no limits'}")
    limit, at_once = limit_s(told["MaxWall"]), _room(site, told["MaxTRESPU"])
    if limit is not None and site.seconds > limit:
        problems.append(f"time {site.time} is longer than MaxWall: set time: {time_of(limit)} at most")
    if 0 in (at_once, _room(site, told["MaxTRES"])):
        problems.append("a job of the profile asks for more than it allows: ask for less, or name another qos")
    if not problems and at_once is not None and at_once < site.at_once:
        advice = f"the other jobs wait: at_once: {at_once} in the profile says how many run"
        return Finding(what, "warning", f"{found}: room for {at_once} job(s) at once", advice)
    return judged(what, found, unless=not problems, advice="; ".join(problems))


def _own(told: Told, site: Site, field: str) -> list[str]:
    """A field of the user's accounts, or of the profile's alone, where it is not empty."""
    rows = [dict(zip(OF_ACCOUNT, line.split("|"), strict=False)) for line in told.text.splitlines() if "|" in line]
    return [row[field] for row in rows if row.get(field) and site.account in (None, row["Account"])]


def _qos(site: Site, accounts: Told) -> dict[str, str]:
    """The limits of the quality of service that jobs of a profile get; empty where it is not known."""
    name = site.qos or next(iter(_own(accounts, site, "DefaultQOS")), None)
    if name is None:
        return {}
    told = ask(*ASK, "qos", f"format={','.join(OF_QOS)}", f"names={name}")
    rows = [dict(zip(OF_QOS, line.split("|"), strict=False)) for line in told.text.splitlines()]
    return next((row for row in rows if len(row) == len(OF_QOS) and row["Name"] == name), {})


def _room(site: Site, told: str) -> int | None:
    """Jobs of one node of a profile for which resources suffice; None for no limit.

    sacctmgr writes them like ``cpu=40,gres/gpu=4,mem=64G,node=2``; memory is left out of account.
    """
    allowed = {name: int(number) for name, number in re.findall(r"([^,=]+)=(\d+)(?=,|$)", told)}
    asked = {"cpu": site.cpus, "node": 1, "gres/gpu": site.gpus, f"gres/gpu:{site.gpu_kind}": site.gpus}
    return min((allowed[name] // asked[name] for name in asked.keys() & allowed if asked[name]), default=None)


def limit_s(told: str) -> int | None:
    """Seconds of a time as Slurm prints it; None for no limit."""
    if told in UNLIMITED or not told:
        return None
    days, _, clock = told.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def time_of(seconds: int) -> str:
    """As a profile writes it."""
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}-{hour:02}:{minute:02}:{second:02}" if days else f"{hour:02}:{minute:02}:{second:02}"
