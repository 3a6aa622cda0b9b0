"""Jobs of a submission on this machine, each run by a separate process, ``modis-dist job local``.

The process outlives the command that submitted it and is found by its command line, which names the job's script.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread

import psutil

from modis_dist.config.cluster import Site
from modis_dist.integrations.slurm.queue import Job
from modis_dist.runtime.errors import Interrupted
from modis_dist.runtime.processes import running_process
from modis_dist.runtime.signals import Flag, on_signal

COMMAND = ("-m", "modis_dist", "job", "local")


class LocalQueue:
    """A queue on this machine. A job id is the number and start time of the process that runs the job."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def submit(self, text: str, *, folder: Path, mark: str, tasks: Sequence[int], after: Sequence[str]) -> str:
        script = folder / "scripts" / f"{mark}.sh"
        script.write_text(text)
        command = [sys.executable, *COMMAND, str(script)]
        command += [f"--task={task}" for task in tasks] + [f"--after={number}" for number in after]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(self._site.gpus)))}
        with (folder / "logs" / f"{mark}-queue.log").open("ab") as log:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        Thread(target=process.wait, name="reap", daemon=True).start()  # no zombie while this process lives
        return _number(psutil.Process(process.pid))

    def marked(self, mark: str) -> str | None:
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if tuple(words[1:5]) == COMMAND and any(word.endswith(f"/{mark}.sh") for word in words[5:]):
                return _number(process)
        return None

    def jobs(self, numbers: Sequence[str]) -> dict[str, Job]:
        return {number: Job(number, "RUNNING" if _process(number) else "COMPLETED") for number in numbers}

    def cancel(self, numbers: Sequence[str]) -> None:
        for number in numbers:
            if (process := _process(number)) is not None:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGTERM)


def run_local(script: Path, *, tasks: Sequence[int], after: Sequence[str]) -> None:
    """Run a job's script on this machine after other jobs have ended: once, or for each task of an array.

    Later tasks run even if one fails. Raises ``Interrupted`` after a signal, once the running script has ended.
    """
    logs, flag = script.parent.parent / "logs", Flag()
    with on_signal(flag.set):
        while any(map(_process, after)) and flag.requested() is None:
            time.sleep(0.2)
        for task in tasks or (None,):
            if flag.requested() is None:
                with (logs / f"{script.stem}{'' if task is None else f'_{task}'}.log").open("ab") as log:
                    _run(script, task, log.fileno(), flag)
    if reason := flag.requested():
        raise Interrupted(reason)


def _run(script: Path, task: int | None, log: int, flag: Flag) -> None:
    environment = {**os.environ} if task is None else {**os.environ, "SLURM_ARRAY_TASK_ID": str(task)}
    folder = script.parent.parent
    with subprocess.Popen(["bash", str(script)], cwd=folder, env=environment, stdout=log, stderr=log) as running:
        while running.poll() is None:
            if flag.requested():
                running.send_signal(signal.SIGTERM)
                running.wait()
            time.sleep(0.1)


def _number(process: psutil.Process) -> str:
    return f"{process.pid}-{process.create_time():.2f}"


def _process(number: str) -> psutil.Process | None:
    """Return the process of a job while it runs."""
    pid, _, started = number.partition("-")
    return running_process(int(pid), started=float(started))
