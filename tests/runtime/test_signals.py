"""Real signals to a process inside ``on_signal``: the first of each kind is reported, the second ends the process."""

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
    # Poll: Python would handle a signal that arrives just before a blocking read only after that read.
    while True:
        if select.select([sys.stdin], [], [], 0.05)[0]:
            if not (line := sys.stdin.readline()):
                return
            yield line

signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[1] == "nohup" else signal.SIG_DFL)
with on_signal(lambda reason: print(reason, flush=True)):
    print("ready", flush=True)
    for line in lines():
        if line == "stop\\n":
            break
        print("alive", flush=True)
print("restored", [signal.getsignal(n) is signal.SIG_DFL for n in (signal.SIGTERM, signal.SIGUSR1)], flush=True)
for line in lines():
    print("alive", flush=True)
"""

Listener = subprocess.Popen[str]


def started(mode: str) -> Listener:
    command = [sys.executable, "-c", LISTENER, mode]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert read_line(process) == "ready"
    return process


@pytest.fixture
def listener() -> Iterator[Listener]:
    with started("plain") as process:
        yield process
        process.kill()


def read_line(listener: Listener) -> str:
    assert listener.stdout is not None
    return listener.stdout.readline().strip()


def reply_to(listener: Listener, line: str) -> str:
    """Send a line and return the reply."""
    assert listener.stdin is not None
    listener.stdin.write(f"{line}\n")
    listener.stdin.flush()
    return read_line(listener)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_second_signal_of_the_same_kind_has_its_default_action(number: signal.Signals, listener: Listener) -> None:
    listener.send_signal(number)
    assert read_line(listener) == f"got {number.name}" and reply_to(listener, "?") == "alive"
    listener.send_signal(number)
    _, stderr = listener.communicate(timeout=60)
    ended_by_python = number is signal.SIGINT  # a KeyboardInterrupt
    assert listener.returncode in ({-number, 1} if ended_by_python else {-number})
    first_line = stderr.splitlines()[0]
    assert first_line.startswith(f"{number.name}: ") and first_line.count(number.name) == 2


def test_signals_of_other_kinds_do_not_end_the_process(listener: Listener) -> None:
    for number in SIGNALS:
        listener.send_signal(number)
        assert read_line(listener) == f"got {number.name}"
    assert reply_to(listener, "?") == "alive" and listener.poll() is None


def test_after_the_block_every_signal_has_its_default_action(listener: Listener) -> None:
    listener.send_signal(signal.SIGTERM)
    assert read_line(listener) == "got SIGTERM"
    assert reply_to(listener, "stop") == "restored [True, True]"
    listener.send_signal(signal.SIGTERM)
    assert listener.wait(60) == -signal.SIGTERM


def test_an_ignored_sighup_stays_ignored() -> None:
    with started("nohup") as listener:
        for _ in range(2):
            listener.send_signal(signal.SIGHUP)
        assert reply_to(listener, "?") == "alive"
        listener.kill()
