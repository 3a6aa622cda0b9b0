"""Common behaviour of all commands: exit codes, one-line errors, fast help with examples, private outputs."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from modis_dist.cli import main
from modis_dist.cli.main import run
from modis_dist.runtime.errors import (
    ConfigError,
    DataError,
    Interrupted,
    ModisError,
    RunFailed,
    SweepIncomplete,
    UserError,
    nearest,
)
from modis_dist.runtime.text import shown

HEAVY = ("torch", "ray", "mlflow", "pandas", "sklearn", "matplotlib", "numpy", "pyarrow", "pydantic", "yaml")
COMMANDS = [
    ["tune"],
    ["status"],
    ["train"],
    ["evaluate"],
    ["verify-resume"],
    ["predict"],
    ["embed"],
    ["translate"],
    ["model"],
    ["config"],
    ["ui"],
    ["mlflow-sync"],
    ["doctor"],
    ["submit"],
    ["cancel"],
    ["resume"],
    ["fetch"],
    ["data", "import"],
    ["data", "check"],
    ["data", "describe"],
    ["data", "simulate", "intersim"],
]

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    """Restore the umask, which commands set for their process."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def raised(monkeypatch: pytest.MonkeyPatch, error: BaseException, *options: str) -> int:
    """Return the exit code of a command that raises an error."""

    def failing(arguments: list[str]) -> int:
        del arguments
        raise error

    monkeypatch.setattr(main, "_invoke", failing)
    return run(["config", *options])


# --- exit codes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a: b"), 2, "error: a: b\n"),
        (DataError("file: damaged"), 2, "error: file: damaged\n"),
        (ConfigError(["lr: too small"], source="s.yaml"), 2, "error: s.yaml: lr: too small\n"),
        (RunFailed("out: loss is nan at step 3"), 3, "error: out: loss is nan at step 3\n"),
        (SweepIncomplete("2 trials failed"), 4, "error: 2 trials failed\n"),
        (Interrupted("state saved"), 75, "state saved\n"),
        (KeyboardInterrupt(), 75, None),
        (typer.Abort(), 75, "interrupted\n"),
        (ModisError("odd"), 70, "error: odd\n"),
        (ZeroDivisionError("x"), 70, None),
        (PermissionError(13, "Permission denied", "/x\n/y"), 2, "error: /x\\n/y: Permission denied\n"),
        (OSError("no name"), 2, "error: no name\n"),
        (DataError("two\nlines\tand \x1b[31mcolour"), 2, "error: two lines and \\x1b[31mcolour\n"),
    ],
)
def test_an_error_prints_one_line_and_exits_with_its_code(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, error: BaseException, code: int, line: str | None
) -> None:
    assert raised(monkeypatch, error) == code
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and not printed.out
    if line is not None:
        assert printed.err == line


def test_a_bug_is_reported_with_its_exception_and_the_debug_option(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    assert raised(monkeypatch, ZeroDivisionError("x")) == 70
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and "ZeroDivisionError: x" in printed and "--debug" in printed


def test_debug_shows_the_traceback_before_the_message_and_keeps_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    assert raised(monkeypatch, RunFailed("loss is nan"), "--debug") == 3
    printed = capsys.readouterr().err
    assert "Traceback" in printed and printed.endswith("error: loss is nan\n")


@pytest.mark.parametrize("arguments", [["--debug", "config", "no.yaml"], ["config", "no.yaml", "--debug"]])
def test_debug_is_accepted_before_and_after_the_command(arguments: list[str], capsys: Captured) -> None:
    assert run(arguments) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["tunee"], "No such command 'tunee'. Did you mean 'tune'?; see `modis-dist --help`"),
        (["tune"], "Missing argument 'STUDY.yaml'; see `modis-dist tune --help`"),
        (["tune", "s.yaml", "--otu", "x"], "No such option: --otu (Possible options: --out"),
        (["tune", "s.yaml", "b"], "Got unexpected extra argument(s) (b); see `modis-dist tune --help`"),
        (["train", "s.yaml"], "Missing option '--out'; see `modis-dist train --help`"),
        (["tune", "s.yaml", "--out"], "requires an argument"),
        (["data", "imprt"], "No such command 'imprt'. Did you mean 'import'?; see `modis-dist data --help`"),
        (["--colour"], "No such option: --colour"),
        (["config"], "config: "),
        (["config", "s.yaml", "--schema"], "config: "),
        (["ui", "x", "--port", "http"], "Invalid value for '--port'"),
        (["ui", "x", "--port", "70000"], "Invalid value for '--port'"),
    ],
)
def test_a_usage_error_is_one_line_with_a_pointer_to_the_help(
    arguments: list[str], line: str, capsys: Captured
) -> None:
    assert run(arguments) == 2
    printed = capsys.readouterr()
    assert (
        printed.err.startswith("error: ") and printed.err.count("\n") == 1 and line in printed.err and not printed.out
    )


def test_version_and_help_end_with_0(capsys: Captured) -> None:
    assert run(["--version"]) == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", capsys.readouterr().out)
    assert run([]) == 0 and run(["--help"]) == 0 and run(["data"]) == 0
    assert not capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_help_of_a_command_shows_an_example_of_it(command: list[str], capsys: Captured) -> None:
    assert run([*command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Example: modis-dist {' '.join(command)} " in " ".join(text.split())


def test_no_help_text_contains_html_tags() -> None:
    """Markdown drops `<name>` as an HTML tag."""
    swallowed = re.compile(r"<[a-z]+>")

    def texts(command: object) -> list[str]:
        inner = [text for sub in getattr(command, "commands", {}).values() for text in texts(sub)]
        options = [getattr(option, "help", None) or "" for option in getattr(command, "params", [])]
        return [str(getattr(command, "help", "")), *options, *inner]

    printed = texts(typer.main.get_command(main.app))
    assert len(printed) > 40
    assert [text for text in printed if swallowed.search(text)] == []


def test_the_examples_cover_every_command() -> None:
    def leaves(group: object, path: list[str]) -> list[list[str]]:
        inner = getattr(group, "commands", None)
        return [leaf for name, sub in inner.items() for leaf in leaves(sub, [*path, name])] if inner else [path]

    paths = leaves(typer.main.get_command(main.app), [])
    assert sorted(leaf for leaf in paths if leaf[0] != "job") == sorted(COMMANDS), "commands of jobs are hidden"


# --- processes ------------------------------------------------------------------------------------------------


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys, time; started = time.process_time()\n"
        "from modis_dist.cli.main import run; code = run(['--help'])\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "print('RESULT', code, heavy, time.process_time() - started)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert "Usage: modis-dist" in done.stdout
    code, heavy, seconds = re.search(r"RESULT (\d+) (\[.*\]) (\S+)", done.stdout).groups()  # type: ignore[union-attr]
    assert (code, heavy) == ("0", "[]") and float(seconds) < 1.5


def test_python_m_modis_dist_is_the_command_and_a_closed_pipe_ends_it_quietly(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "modis_dist", "config", "--schema"],
            stdout=pipe,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
            cwd=tmp_path,
        )
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_broken_pipe_that_is_not_stdout_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    assert raised(monkeypatch, BrokenPipeError(32, "Broken pipe")) == 2
    assert capsys.readouterr().err == "error: Broken pipe\n"


def test_outputs_are_private_under_an_open_umask(tmp_path: Path) -> None:
    os.umask(0)
    store = tmp_path / "below" / "store"
    assert run(["data", "simulate", "intersim", "--out", str(store), "--samples", "30", "--classes", "2"]) == 0
    assert run(["data", "check", str(store)]) == 0
    created = [tmp_path / "below", *(tmp_path / "below").rglob("*")]
    assert len(created) > 6
    assert [path for path in created if path.stat().st_mode & 0o077] == []


# --- text of messages -------------------------------------------------------------------------------------------


def test_shown_text_is_printable_ascii_of_at_most_200_characters() -> None:
    assert shown("a\nb\x1b[0m\u202e") == "a\\nb\\x1b[0m\\u202e"
    assert shown([1, "x"]) == "[1, 'x']"
    assert len(shown("x" * 10_000)) == 200 and shown("x" * 200) == "x" * 200


def test_only_a_similar_name_is_suggested() -> None:
    assert nearest("mrna", ["mirna", "cnv"]) == "; did you mean 'mirna'?"
    assert nearest("protein", ["mirna", "cnv"]) == ""
    assert nearest("a\x1b", ["a\x1bb"]) == "; did you mean 'a\\x1bb'?"
