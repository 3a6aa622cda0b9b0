"""The jobs of a submission on this machine, by submitit's controller: the same path without Slurm."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread

import psutil
from submitit import LocalExecutor

from modis_dist.config.cluster import Site
from modis_dist.integrations.slurm.queue import Job
from modis_dist.runtime.errors import Interrupted
from modis_dist.runtime.processes import running_process
from modis_dist.runtime.signals import Flag, on_signal

FOREVER_MIN = 10 * 365 * 24 * 60  # nobody else waits for this machine, and submitit's end of time saves nothing


class LocalQueue:
    """This machine. A job's number is that of a process, and when it began."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def submit(self, text: str, *, folder: Path, mark: str, tasks: Sequence[int], after: Sequence[str]) -> str:
        """See ``Queue.submit``."""
        script = folder / "scripts" / f"{mark}.sh"
        script.write_text(text)
        words = [sys.executable, "-m", "modis_dist", "job", "here", str(script)]
        words += [f"--task={task}" for task in tasks] + [f"--after={number}" for number in after]
        executor = LocalExecutor(folder=folder / "logs")
        executor.update_parameters(timeout_min=FOREVER_MIN, stderr_to_stdout=True)
        executor.parameters["gpus_per_node"] = self._site.gpus
        job = executor._submit_command(shlex.join(words))
        Thread(target=job._process.wait, name="reap", daemon=True).start()  # for as long as somebody waits here
        return _number(psutil.Process(int(job.job_id)))

    def marked(self, mark: str) -> str | None:
        """See ``Queue.marked``."""
        for process in psutil.process_iter(["cmdline", "environ"]):
            if f"{mark}.sh" in ((process.info["environ"] or {}).get("SUBMITIT_LOCAL_COMMAND") or ""):
                words = process.info["cmdline"] or []
                if "submitit.local._local" in words:
                    return _number(process)
        return None

    def jobs(self, numbers: Sequence[str]) -> dict[str, Job]:
        """See ``Queue.jobs``."""
        return {number: Job(number, "RUNNING" if _process(number) else "COMPLETED") for number in numbers}

    def cancel(self, numbers: Sequence[str]) -> None:
        """See ``Queue.cancel``; trainings save before they end."""
        for number in numbers:
            if (process := _process(number)) is not None:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGTERM)


def run_here(script: Path, *, tasks: Sequence[int], after: Sequence[str]) -> None:
    """Run a job's script here once other jobs have ended: once, or for each task of an array.

    A task that fails does not keep the next one from running. Raises ``Interrupted`` after a signal, when the script
    that runs has ended.
    """
    logs, flag = script.parent.parent / "logs", Flag()
    with on_signal(flag.set):
        while any(map(_process, after)) and flag.requested() is None:
            time.sleep(0.2)
        turns: Sequence[int | None] = tasks or [None]
        for task in turns:
            if flag.requested() is None:
                with (logs / f"{script.stem}{'' if task is None else f'_{task}'}.log").open("ab") as log:
                    _run(script, task, log.fileno(), flag)
    if reason := flag.requested():
        raise Interrupted(reason)


def _run(script: Path, task: int | None, log: int, flag: Flag) -> None:
    environment = {**os.environ} if task is None else {**os.environ, "SLURM_ARRAY_TASK_ID": str(task)}
    command = ["bash", str(script)]
    with subprocess.Popen(
        command,
        cwd=script.parent.parent,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    ) as running:  # a session of its own: a terminal's signals come once, from here
        while running.poll() is None:
            if flag.requested():
                running.send_signal(signal.SIGTERM)
                running.wait()
            time.sleep(0.1)


def _number(process: psutil.Process) -> str:
    return f"{process.pid}-{process.create_time():.2f}"


def _process(number: str) -> psutil.Process | None:
    """The process of a job, where it still runs."""
    pid, _, started = number.partition("-")
    return running_process(int(pid), started=float(started))
