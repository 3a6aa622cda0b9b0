"""`--help` of every tool and benchmark prints its docstring, from any folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench.__main__ import COMMANDS, main

TOOLS = sorted(
    path for path in (Path(__file__).resolve().parents[2] / "tools").glob("*.py") if path.name != "__init__.py"
)


def first_words(docstring: str) -> str:
    """Return words that fit on one line of any help page."""
    return " ".join(docstring.split()[:4])


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_help_is_the_docstring_of_the_tool(tool: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, tool, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    expected = first_words(tool.read_text().split('"""')[1])
    assert done.stdout.startswith(f"usage: {tool.name}") and expected in " ".join(done.stdout.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_the_docstring_of_the_benchmark(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    stdout = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and stdout.startswith(f"usage: python -m tools.bench {name} ")
    assert first_words(COMMANDS[name].__doc__ or "") in stdout and "--json" in stdout


def test_help_lists_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert all(any(line.startswith(f"    {name} ") for line in lines) for name in COMMANDS)
