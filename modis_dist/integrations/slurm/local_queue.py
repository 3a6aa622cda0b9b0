"""Jobs of a submission on this machine, run by submitit's local controller.

``submitit.local.local.start_controller`` is public. To find a controller whose sender was killed, two names that
submitit gives it are read as well: the module ``submitit.local._local`` that it runs, and the environment variable
``SUBMITIT_LOCAL_COMMAND`` that holds its command.
"""

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
from submitit.local.local import start_controller

from modis_dist.config.cluster import Site
from modis_dist.integrations.slurm.queue import Job
from modis_dist.runtime.errors import Interrupted
from modis_dist.runtime.processes import running_process
from modis_dist.runtime.signals import Flag, on_signal

NO_LIMIT_MIN = 10 * 365 * 24 * 60  # nobody waits for this machine, and submitit's time limit saves nothing
CONTROLLER, COMMAND_VARIABLE = "submitit.local._local", "SUBMITIT_LOCAL_COMMAND"


class LocalQueue:
    """A queue on this machine. A job id is the process id and start time of its controller."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def submit(self, text: str, *, folder: Path, mark: str, tasks: Sequence[int], after: Sequence[str]) -> str:
        """See ``Queue.submit``."""
        script = folder / "scripts" / f"{mark}.sh"
        script.write_text(text)
        words = [sys.executable, "-m", "modis_dist", "job", "here", str(script)]
        words += [f"--task={task}" for task in tasks] + [f"--after={number}" for number in after]
        controller = start_controller(
            folder / "logs",
            shlex.join(words),
            cuda_devices=",".join(map(str, range(self._site.gpus))),
            timeout_min=NO_LIMIT_MIN,
            stderr_to_stdout=True,
        )
        Thread(target=controller.wait, name="reap", daemon=True).start()  # no zombie while this process lives
        return _number(psutil.Process(controller.pid))

    def marked(self, mark: str) -> str | None:
        """See ``Queue.marked``."""
        for process in psutil.process_iter(["cmdline", "environ"]):
            command = (process.info["environ"] or {}).get(COMMAND_VARIABLE) or ""
            if f"{mark}.sh" in command and CONTROLLER in (process.info["cmdline"] or []):
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
    command = ["bash", str(script)]
    with subprocess.Popen(
        command,
        cwd=script.parent.parent,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    ) as running:  # in a new session: a terminal's signals arrive once, from this process
        while running.poll() is None:
            if flag.requested():
                running.send_signal(signal.SIGTERM)
                running.wait()
            time.sleep(0.1)


def _number(process: psutil.Process) -> str:
    return f"{process.pid}-{process.create_time():.2f}"


def _process(number: str) -> psutil.Process | None:
    """Return the controller of a job while it runs."""
    pid, _, started = number.partition("-")
    return running_process(int(pid), started=float(started))
