"""Real signals to a process that has said how it wants them: one of each kind is heard, another of a kind acts."""

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from modis_dist.runtime.signals import SIGNALS

LISTENER = """
import select, signal, sys
from modis_dist.runtime.signals import on_signal

def lines():
    # Between two looks Python handles signals; one that comes just before a read would wait for its end.
    while True:
        if select.select([sys.stdin], [], [], 0.05)[0]:
            if not (line := sys.stdin.readline()):
                return
            yield line

signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[1] == "nohup" else signal.SIG_DFL)
with on_signal(lambda reason: print(reason, flush=True)):
    print("listens", flush=True)
    for line in lines():
        if line == "stop\\n":
            break
        print("lives", flush=True)
print("as before", [signal.getsignal(n) is signal.SIG_DFL for n in (signal.SIGTERM, signal.SIGUSR1)], flush=True)
for line in lines():
    print("lives", flush=True)
"""

Listener = subprocess.Popen[str]


def started(how: str) -> Listener:
    command = [sys.executable, "-c", LISTENER, how]
    pipe = subprocess.PIPE
    found = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert told(found) == "listens"
    return found


@pytest.fixture
def listener() -> Iterator[Listener]:
    with started("plain") as found:
        yield found
        found.kill()


def told(listener: Listener) -> str:
    assert listener.stdout is not None
    return listener.stdout.readline().strip()


def asked(listener: Listener, line: str) -> str:
    """Return the listener's answer to a line."""
    assert listener.stdin is not None
    listener.stdin.write(f"{line}\n")
    listener.stdin.flush()
    return told(listener)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_second_signal_of_a_kind_acts_as_before(number: signal.Signals, listener: Listener) -> None:
    listener.send_signal(number)
    assert told(listener) == f"got {number.name}" and asked(listener, "?") == "lives"
    listener.send_signal(number)
    _, complaint = listener.communicate(timeout=60)
    ended_by_python = number is signal.SIGINT  # a KeyboardInterrupt
    assert listener.returncode in ({-number, 1} if ended_by_python else {-number})
    assert f"{number.name}: saving, then stopping; a second {number.name} stops immediately" in complaint


def test_signals_of_other_kinds_do_not_end_the_process(listener: Listener) -> None:
    for number in SIGNALS:
        listener.send_signal(number)
        assert told(listener) == f"got {number.name}"
    assert asked(listener, "?") == "lives" and listener.poll() is None


def test_after_the_block_every_signal_acts_as_before(listener: Listener) -> None:
    listener.send_signal(signal.SIGTERM)
    assert told(listener) == "got SIGTERM"
    assert asked(listener, "stop") == "as before [True, True]"
    listener.send_signal(signal.SIGTERM)
    assert listener.wait(60) == -signal.SIGTERM


def test_an_ignored_sighup_stays_ignored() -> None:
    with started("nohup") as listener:
        for _ in range(2):
            listener.send_signal(signal.SIGHUP)
        assert asked(listener, "?") == "lives"
        listener.kill()
