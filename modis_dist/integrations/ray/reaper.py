"""Ends a private Ray and removes its folder once its driver is gone, however it ended.

Runs as a process of its own, beside the driver, which holds the other end of its standard input: ``python
reaper.py FOLDER``. Most of Ray dies with its driver by itself, but its agents stay for a minute to tell a server
that is not there any more. Needs the standard library only, to start within a few hundredths of a second.
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
    """Wait for the end of standard input, then clear up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the driver; a terminal sends them to everybody
    while os.read(0, 1):
        pass
    end = time.monotonic() + PATIENCE_S
    while (found := processes_of(folder)) and time.monotonic() < end:
        for process in found:
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


def processes_of(folder: Path) -> list[int]:
    """Living processes that were started with the token of a folder.

    Those that give themselves a title, as Ray's agents do, may wipe their environment from its start; they are known
    by the logs they hold open in the folder.
    """
    return [int(place.name) for place in Path("/proc").glob("[0-9]*") if _belongs(place, folder)]


def _belongs(place: Path, folder: Path) -> bool:
    mark = os.fsencode(f"RAY_AUTH_TOKEN_PATH={folder / TOKEN}")
    try:
        environment = (place / "environ").read_bytes()  # empty of one that waits to be reaped
        if mark in environment.split(b"\0"):
            return True
        wiped = environment.startswith(b"\0")
        return wiped and any(_is_below(file, folder) for file in (place / "fd").iterdir())
    except OSError:  # somebody else's, or gone
        return False


def _is_below(link: Path, folder: Path) -> bool:
    with suppress(OSError):  # closed in the meantime
        return link.readlink().is_relative_to(folder)
    return False


if __name__ == "__main__":
    main(Path(sys.argv[1]))
