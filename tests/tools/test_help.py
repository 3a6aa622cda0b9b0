"""Every tool starts from any folder and explains itself."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = sorted(
    path for path in (Path(__file__).resolve().parents[2] / "tools").glob("*.py") if path.name != "__init__.py"
)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_help_is_the_docstring_of_the_tool(tool: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, tool, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    first_words = tool.read_text().split('"""')[1].split()[:4]
    assert done.stdout.startswith(f"usage: {tool.name}") and " ".join(first_words) in " ".join(done.stdout.split())
    assert list(tmp_path.iterdir()) == []
