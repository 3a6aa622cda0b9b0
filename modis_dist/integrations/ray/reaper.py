"""End a private Ray and remove its folder once its driver has ended, for whatever reason.

Runs as a separate process, ``python reaper.py FOLDER``, whose standard input the driver holds open. Most of Ray dies
with its driver, but its agents retry for a minute to reach a server that is gone. Imports only the standard library,
to start within a few hundredths of a second.
"""

import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

TOKEN = "token"
PATIENCE_S = 5.0


def main(folder: Path) -> None:
    """Wait for the end of standard input, then clean up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the driver; a terminal signals its whole process group
    while os.read(0, 1):
        pass
    end = time.monotonic() + PATIENCE_S
    while (processes := processes_of(folder)) and time.monotonic() < end:
        for process in processes:
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


def processes_of(folder: Path, *, proc: Path = Path("/proc")) -> list[int]:
    """Return the living processes that were started with the token of a folder.

    Processes that set their title, as Ray's agents do, may overwrite their environment; the logs that they hold open in
    the folder identify them.
    """
    return [int(process.name) for process in proc.glob("[0-9]*") if _belongs(process, folder)]


def _belongs(process: Path, folder: Path) -> bool:
    token = os.fsencode(f"RAY_AUTH_TOKEN_PATH={folder / TOKEN}")
    try:
        environment = (process / "environ").read_bytes()  # empty for a zombie
        if token in environment.split(b"\0"):
            return True
        overwritten = environment.startswith(b"\0")
        return overwritten and any(_is_below(file, folder) for file in (process / "fd").iterdir())
    except OSError:  # of another user, or gone
        return False


def _is_below(link: Path, folder: Path) -> bool:
    with suppress(OSError):  # closed in the meantime
        return link.readlink().is_relative_to(folder)
    return False


if __name__ == "__main__":
    main(Path(sys.argv[1]))
