"""The commands and the YAML of the README work."""

import re
import subprocess
from pathlib import Path

import pytest

from modis_dist.cli.main import run as command
from modis_dist.config import parse, yaml12
from modis_dist.config.run import Run

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_two_commands_stand_below_their_heading() -> None:
    section = TEXT.split("## Two commands\n")[1].split("\n## ")[0]
    assert section.count("```") == 4
    first, second = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    assert "tune_spaces/quickstart.yaml" in first and "pytest" in second
    assert all("-c constraints.txt" in one for one in (first, second))


def test_every_command_of_the_tour_has_a_help_page(capsys: pytest.CaptureFixture[str]) -> None:
    told = [  # words of each
        line.split("#")[0].split()[1:]
        for block in blocks("bash")
        for line in block.splitlines()
        if line.startswith("modis-dist")
    ]
    assert len(told) > 8
    for words in told:
        name = words[:2] if words[0] == "data" else words[:1]
        assert command([*name, "--help"]) == 0
        page = capsys.readouterr().out
        options = [word for word in words if word.startswith("--")]
        assert all(option in page for option in options), words


def test_the_yaml_of_the_tour_is_a_scenario_that_loads() -> None:
    for block in blocks("yaml"):
        run = parse.build(Run, yaml12.parse(block, source="README.md"), source="README.md")
        assert len(run.scenario) == 3


def test_the_constraints_pin_what_the_project_needs() -> None:
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and line[0] != "#"
    )
    assert pinned["torch"] == "2.13.0" and pinned["mlflow"] == "3.17.2"
    names = {re.split(r"[\[><=]", line.strip(' ",'))[0].lower() for line in _dependencies()}
    assert names <= {name.lower() for name in pinned}, names - {name.lower() for name in pinned}


def _dependencies() -> list[str]:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]


def test_no_tracked_file_is_over_a_megabyte() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert not [name for name in listed.stdout.split("\n") if name and (ROOT / name).stat().st_size > 1_000_000]


def test_the_shapes_that_the_readme_tells_are_those_of_the_study() -> None:
    features = parse.load_study(ROOT / "tune_spaces" / "tcga10_small.yaml").model.modalities
    told = {int(number) for number in re.findall(r"\d,\d{3} x (\d+)", TEXT)}
    assert told == {one.features for one in features.values()}
