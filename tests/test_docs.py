"""README and docs: commands and tools exist with their options, YAML loads, keys exist, links resolve."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from modis_dist.cli.main import run as command
from modis_dist.config import parse, yaml12
from modis_dist.config.run import Run
from modis_dist.config.study import Study

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "cluster" / "README.md", ROOT / "tools/bench/README.md"]


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def test_two_commands_install_and_run() -> None:
    section = README.read_text().split("## Two commands\n")[1].split("\n## ")[0]
    assert section.count("```") == 4
    first, second = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    assert "tune_spaces/quickstart.yaml" in first and "pytest" in second
    assert all("-c constraints.txt" in line for line in (first, second))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_has_a_help_page_with_its_options(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    commands = [line.split("#")[0].split()[1:] for line in lines if line.startswith("modis-dist")]
    assert page != README or len(commands) > 8
    for words in commands:
        name = words[:2] if words[0] == "data" else words[:1]
        assert command([*name, "--help"]) == 0
        options = [word for word in words if word.startswith("--")]
        help_page = capsys.readouterr().out
        assert all(option in help_page for option in options), words


def tool_commands(page: Path) -> list[list[str]]:
    """Return the commands of ``tools`` in a page, in code blocks and in the text, as words."""
    text = page.read_text().replace("\\\n", " ")
    commands = re.findall(r"python (tools/\w+\.py\b[^`\n]*|-m tools\.bench\b[^`\n]*)", text)
    return [shlex.split(line, comments=True) for line in commands]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_tool_that_is_named_exists_with_its_options(page: Path) -> None:
    from tools.bench.__main__ import parser

    for program, *words in tool_commands(page):
        if program == "-m":
            if "--help" not in words:
                parser().parse_args(words[1:])
        else:
            source = (ROOT / program).read_text()
            assert all(f'"{word}"' in source for word in words if word.startswith("--")), (program, words)


def test_commands_of_tools_are_found_in_pages() -> None:
    assert ["tools/soak.py"] in tool_commands(ROOT / "docs" / "evidence.md")
    assert ["-m", "tools.bench", "step", "--json"] in tool_commands(ROOT / "tools/bench/README.md")


def test_the_yaml_of_the_readme_is_a_scenario_that_loads() -> None:
    (block,) = blocks(README, "yaml")
    run = parse.build(Run, yaml12.parse(block, source="README.md"), source="README.md")
    assert len(run.scenario) == 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_configuration_key_that_is_named_exists(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sections = {*Run.model_fields, *Study.model_fields}
    keys = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?::[^`]*)?`", page.read_text())
    for key in {key for key in keys if key.split(".")[0] in sections and key.rsplit(".", 1)[1] not in ("yaml", "json")}:
        assert command(["config", "--explain", key]) == 0, f"{key}: {capsys.readouterr().err}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_heading(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.is_file(), target
        headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
        slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in slugs, target


def test_the_constraints_pin_every_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line and line[0] != "#"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = {re.split(r"[\[><=]", requirement)[0].lower() for requirement in needed}
    assert names <= pinned, names - pinned


def test_no_tracked_file_is_over_a_megabyte() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert not [name for name in listed.stdout.split("\n") if name and (ROOT / name).stat().st_size > 1_000_000]
