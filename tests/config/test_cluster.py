"""Site profiles: refusals, shipped profiles, and the documentation of keys in cluster/README.md."""

import re
import shutil
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from modis_dist.cli.main import run
from modis_dist.config import yaml12
from modis_dist.config.cluster import RESERVED_OPTIONS, Site, load_site
from modis_dist.runtime.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PROFILES = sorted((ROOT / "cluster").rglob("*.yaml"))
GUIDE = (ROOT / "cluster" / "README.md").read_text()
RULES: dict[str, dict[str, Any]] = Site.model_json_schema()["properties"]
WORDS = ("partition", "account", "qos", "constraint", "gpu_kind")
INJECTIONS = (
    *(
        "gpu; rm -rf /",
        "$(id)",
        "`id`",
        "gpu && id",
        "gpu\nid",
        "gpu\n",
        "\ngpu",
        "gpu id",
        'gpu"',
        "gpu'",
        "gpu\\",
        "$HOME",
    ),
    *(
        "gpu>x",
        "gpu<x",
        "(gpu)",
        "{a,b}",
        "gpu!",
        "gpu#x",
        "gpu~",
        "gpu%j",
        "gp\u00fc",
        "gpu\u2028id",
        "gpu\x1b[0m",
        "gpu\t",
    ),
    *("--wrap=id", "-p", "=gpu", "", " ", "g" * 201),
)


def profile(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def mistakes_of(tmp_path: Path, tree: dict[str, Any]) -> list[str]:
    """Return the mistakes of a profile; check that the error is one line with the file name, and exit status 2."""
    path = profile(tmp_path, yaml12.dump(tree))
    with pytest.raises(ConfigError) as refused:
        load_site(path)
    assert str(refused.value).startswith(f"{path}: ") and str(refused.value).isprintable()
    assert refused.value.exit_code == 2
    return refused.value.problems


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", Site.model_fields)
@pytest.mark.parametrize("value", [{"a": 1}, [[1]], True, 2.5])
def test_a_value_of_the_wrong_type_is_refused_by_its_key(key: str, value: object, tmp_path: Path) -> None:
    problems = mistakes_of(tmp_path, {key: value})
    assert all(re.match(rf"{key}(\[0\])?: must be ", problem) for problem in problems), problems


@pytest.mark.parametrize("key", [key for key, rule in RULES.items() if rule.get("type") == "integer"])
def test_an_integer_out_of_range_is_refused_and_the_bounds_are_accepted(key: str, tmp_path: Path) -> None:
    rule, required = RULES[key], {"time": "2-00:00:00"}
    for end, beyond in (("minimum", -1), ("maximum", 1)):
        if end in rule:
            assert getattr(load_site(profile(tmp_path, yaml12.dump({**required, key: rule[end]}))), key) == rule[end]
            (problem,) = mistakes_of(tmp_path, {**required, key: rule[end] + beyond})
            assert re.match(rf"{key}: must be [<>]= {rule[end]} ", problem)
    assert "minimum" in rule


@pytest.mark.parametrize("key", WORDS)
@pytest.mark.parametrize("value", INJECTIONS)
def test_an_sbatch_argument_with_shell_syntax_is_refused(key: str, value: str, tmp_path: Path) -> None:
    (problem,) = mistakes_of(tmp_path, {key: value, "gpus": 1})
    assert problem.startswith(f"{key}: ")


@pytest.mark.parametrize(
    "value",
    [
        *(
            "240",
            "90:00",
            "4h",
            "1-2",
            "00:00:00",
            "0-00:00:00",
            "1:60:00",
            "1:00:60",
            "1:0:00",
            "-1:00:00",
            "1000:00:00",
        ),
        *(
            "1000-00:00:00",
            "UNLIMITED",
            "04:00:00\n",
            " 04:00:00",
            "04:00:00; id",
            "\u0664:00:00",
            "\uff14:00:00",
            240,
            None,
        ),
    ],
)
def test_a_time_that_is_not_days_hours_minutes_seconds_is_refused(value: object, tmp_path: Path) -> None:
    (problem,) = mistakes_of(tmp_path, {"time": value})
    assert problem.startswith("time: must be [days-]hours:minutes:seconds, above 0 (got ")


@pytest.mark.parametrize(
    "value", ["16", "16 G", "16GB", "0G", "-1G", "1.5G", "16g", "16K", "16G\n", "\u0661G", "9" * 10 + "T"]
)
def test_memory_without_a_slurm_unit_is_refused(value: str, tmp_path: Path) -> None:
    (problem,) = mistakes_of(tmp_path, {"memory": value})
    assert problem.startswith("memory: must be ")


@pytest.mark.parametrize(
    "value",
    [
        *(
            "-C",
            "hint=x",
            "hint",
            "--hint nomultithread",
            "--hint=$(id)",
            "--hint=`id`",
            "--hint=a;id",
            "--hint='a'",
            "--hint=",
        ),
        *(
            "--",
            "--hint=a\n",
            "--hint=a\n#SBATCH --uid=0",
            "--Hint=a",
            "---hint",
            "--hint=a\\",
            '--hint="a b"',
            "--hint=$X",
            "",
        ),
    ],
)
def test_an_option_that_is_not_one_long_option_is_refused(value: str, tmp_path: Path) -> None:
    (problem,) = mistakes_of(tmp_path, {"options": ["--exclusive", value]})
    assert problem.startswith("options[1]: must be one long option of sbatch")


@pytest.mark.parametrize("name", [*RESERVED_OPTIONS, "part", "outp", "arr", "acc", "wra", "depend", "job"])
@pytest.mark.parametrize("value", ["", "=1"])
def test_a_reserved_option_is_refused_also_if_abbreviated(name: str, value: str, tmp_path: Path) -> None:
    (problem,) = mistakes_of(tmp_path, {"options": [f"--{name}{value}"]})
    assert problem.startswith(f"options: --{name} ") and problem.endswith("; remove it")


@pytest.mark.parametrize("key", ["setup", "python"])
@pytest.mark.parametrize("line", ["module load a\nrm -rf b", "a\r", "a\x1b[2J", "a\u2028b", "a\tb", "", "x" * 2001])
def test_a_multi_line_value_is_refused(key: str, line: str, tmp_path: Path) -> None:
    (problem,) = mistakes_of(tmp_path, {key: ["true", line]})
    assert problem.startswith(key)


@pytest.mark.parametrize("line", ["#SBATCH --uid=0", "  #SBATCH -p gpu"])
def test_an_sbatch_directive_in_setup_is_refused(line: str, tmp_path: Path) -> None:
    (problem,) = mistakes_of(tmp_path, {"setup": [line]})
    assert problem.startswith("setup: #SBATCH ")


@pytest.mark.parametrize(
    "value",
    [
        *(
            "$(id)",
            "`id`",
            "/tmp/$(id)",
            "/tmp/a b",
            "/tmp;id",
            "/tmp\n",
            '/tmp/"',
            "/tmp/'",
            "tmp",
            "-rf",
            "~/x",
            "$",
            "$$",
            "$1",
        ),
        *("${X", "${X:-/tmp}", "${!X}", "$X}", "/tmp/*", "/tmp/\u00e9", "", "/" + "x" * 500),
    ],
)
def test_a_scratch_that_is_not_a_path_or_runs_a_command_is_refused(value: str, tmp_path: Path) -> None:
    (problem,) = mistakes_of(tmp_path, {"scratch": value})
    assert problem.startswith("scratch: ")


@pytest.mark.parametrize(
    ("tree", "problem"),
    [
        ({"gpu_kind": "v100"}, "gpu_kind: requires gpus of 1 or more"),
        ({"time": "00:02:00"}, "warning_s: must be shorter than time (00:02:00)"),
        ({"executor": "local", "nodes": 2}, "nodes: must be 1 for a local profile"),
        ({"python": []}, "python: must have at least 1 element(s) (got [])"),
        ({"tiem": "04:00:00"}, "tiem: unknown key; did you mean 'time'?"),
        ({"executor": "slrum"}, "executor: must be 'slurm' or 'local' (got 'slrum'); did you mean 'slurm'?"),
        ({"setup": "module load x"}, "setup: must be a list (got 'module load x'); write [module load x]"),
        ({"account": 1234}, "account: must be a string (got 1234); write '1234' in quotes"),
    ],
)
def test_a_mistake_is_reported_with_the_value_to_write(tree: dict[str, Any], problem: str, tmp_path: Path) -> None:
    assert mistakes_of(tmp_path, tree) == [problem]


def test_all_mistakes_of_a_profile_are_reported_at_once(tmp_path: Path) -> None:
    problems = mistakes_of(tmp_path, {"partition": "a b", "cpus": 0, "time": 90, "options": ["--mem=3G"], "tiem": 1})
    assert [problem.split(":")[0] for problem in problems] == ["partition", "cpus", "time", "options", "tiem"]


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"account": "CHANGE_ME@v100"}, "account"),
        ({"setup": ["source $WORK/CHANGE_ME/bin/activate"]}, "setup"),
        ({"options": ["--reservation=CHANGE_ME"]}, "options"),
        ({"scratch": "/scratch/CHANGE_ME"}, "scratch"),
    ],
)
def test_a_placeholder_that_was_not_replaced_is_refused(tree: dict[str, Any], key: str, tmp_path: Path) -> None:
    (problem,) = mistakes_of(tmp_path, tree)
    assert problem.startswith(f"{key}: replace CHANGE_ME ")


@pytest.mark.parametrize(
    "text", ["", "- cpus: 4\n", "cpus: 4\ncpus: 5\n", "cpus: !!int 4\n", "a: &b 1\nc: *b\n", "cpus: [\n"]
)
def test_a_file_that_is_not_a_mapping_of_keys_is_refused_by_name(text: str, tmp_path: Path) -> None:
    path = profile(tmp_path, text)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        load_site(path)


# --- accepted values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("partition", value) for value in ("gpu", "gpu_p13", "gpu,cpu", "A100.80", "5xx")),
        *(("account", value) for value in ("abc@v100", "def-pi_gpu", "project:sub")),
        *(("constraint", value) for value in ("v100-32g", "a100&nvlink", "[rack1|rack2]", "[rack1*2&rack2*4]")),
        *(("memory", value) for value in ("1M", "16G", "2T")),
        *(("scratch", value) for value in ("$JOBSCRATCH", "${TMPDIR}/modis", "/scratch/$USER/$SLURM_JOB_ID", "/")),
        (
            "options",
            ("--hint=nomultithread", "--exclusive", "--mail-user=a.b@c.org", "--nodelist=n[1-4,7]", "--mem-per-cpu=4G"),
        ),
        ("gres", ("lscratch:100", "nvme:1", "ssd:fast:200G")),
        ("options", ("--reservation=day_2", "--licenses=a:2", "--no-kill", "--time-min=01:00:00")),
        ("setup", ("module load cuda/12.4", 'source "$HOME/my env/bin/activate"', "export X=$(cat ~/x); set -u")),
        ("python", ("singularity", "exec", "--nv", "my image.sif", "python")),
    ],
)
def test_a_value_that_clusters_need_is_accepted_unchanged(key: str, value: Any, tmp_path: Path) -> None:
    text = yaml12.dump({key: list(value) if isinstance(value, tuple) else value})
    assert getattr(load_site(profile(tmp_path, text)), key) == value


@pytest.mark.parametrize("value", ["gpu:1", "gpu:a100:2", "lscratch", "a:1,b:2", "a:1 --uid=0", "a:$X", ""])
def test_an_invalid_gres_or_one_for_gpus_is_refused(value: str, tmp_path: Path) -> None:
    (problem,) = mistakes_of(tmp_path, {"gres": [value]})
    assert problem.startswith("gres[0]: must be name:number or name:kind:number, e.g. lscratch:100")


def test_an_option_that_only_shares_a_prefix_with_a_reserved_one_is_accepted() -> None:
    assert Site(options=("--nodefile=x", "--wait-all-nodes=1", "--gpu-bind=closest")).options[0] == "--nodefile=x"


@pytest.mark.parametrize("seconds", [121, 3599, 3600, 86399, 86400, 90061, 20 * 3600, 999 * 86400 + 86399])
def test_a_time_is_converted_to_seconds(seconds: int) -> None:
    days, _, clock = str(timedelta(seconds=seconds)).rpartition(" days, ")
    if not days:
        days, _, clock = str(timedelta(seconds=seconds)).rpartition(" day, ")
    assert Site(time=f"{days}-{clock}" if days else clock).seconds == seconds


def test_hours_may_be_more_than_a_day() -> None:
    assert Site(time="100:00:00").seconds == Site(time="4-4:00:00").seconds == timedelta(hours=100).total_seconds()


def test_a_time_without_quotes_stays_text(tmp_path: Path) -> None:
    """YAML 1.1 would read 72,000, a number in base 60."""
    assert load_site(profile(tmp_path, "time: 20:00:00\n")).time == "20:00:00"


# --- shipped profiles -----------------------------------------------------------------------------------------


def filled_in(shipped: Path, tmp_path: Path) -> Site:
    return load_site(profile(tmp_path, shipped.read_text().replace("CHANGE_ME", "mine")))


@pytest.mark.parametrize("shipped", PROFILES, ids=lambda path: path.stem)
def test_a_shipped_profile_names_its_placeholders_and_loads_once_filled_in(shipped: Path, tmp_path: Path) -> None:
    filled_in(shipped, tmp_path)
    values = re.sub(r"#.*", "", shipped.read_text())
    if "CHANGE_ME" not in values:
        load_site(shipped)
        return
    with pytest.raises(ConfigError) as refused:
        load_site(shipped)
    assert len(refused.value.problems) == values.count("CHANGE_ME")
    assert all("CHANGE_ME" in problem for problem in refused.value.problems)


@pytest.mark.parametrize("shipped", PROFILES, ids=lambda path: path.stem)
def test_the_commented_lines_of_a_shipped_profile_load_as_well(shipped: Path, tmp_path: Path) -> None:
    """Uncomment the lines with a key, and the list items below them."""
    offered = re.sub(r"(?m)^# (?=[a-z_]+: |setup:|  - )", "", shipped.read_text())
    site = load_site(profile(tmp_path, offered.replace("CHANGE_ME", "mine")))
    if "generic" in shipped.stem:
        assert site.account == "my_project" and len(site.setup) == 2


def test_the_shipped_profiles_match_their_names(tmp_path: Path) -> None:
    site = {path.stem: filled_in(path, tmp_path) for path in PROFILES}
    assert set(site) == {"local", "generic_cpu", "generic_gpu", "jean_zay"}
    assert site["local"].executor == "local" and site["generic_cpu"].gpus == 0 and site["generic_gpu"].gpus == 1
    jean_zay = site["jean_zay"]
    assert jean_zay.account == "mine@v100" and jean_zay.seconds == 20 * 3600 and jean_zay.scratch == "$JOBSCRATCH"
    assert jean_zay.cpus == 10 * jean_zay.gpus and "--hint=nomultithread" in jean_zay.options


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("shipped", PROFILES, ids=lambda path: path.stem)
def test_the_setup_of_a_shipped_profile_is_valid_shell(shipped: Path, tmp_path: Path) -> None:
    lines = "\n".join(filled_in(shipped, tmp_path).setup)
    assert subprocess.run(["bash", "-n"], input=lines, text=True, check=False, capture_output=True).stderr == ""


# --- documentation of the keys --------------------------------------------------------------------------------


def rows() -> dict[str, list[str]]:
    """Return meaning, default and range of each key from the guide's table."""
    table = GUIDE.split("## Every key")[1].split("\n## ")[0]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines() if line.startswith("| `")]
    texts = [[cell.strip().replace("\\|", "|") for cell in row] for row in cells]
    return {key.strip("`"): rest for key, *rest in texts}


def test_the_guide_has_a_row_for_every_key_in_order_and_no_other() -> None:
    assert list(rows()) == list(Site.model_fields)


@pytest.mark.parametrize("key", Site.model_fields)
def test_the_guide_gives_meaning_default_and_range_of_every_key(key: str) -> None:
    meaning, default, allowed = rows()[key]
    rule = RULES[key]
    assert meaning == rule["description"]
    assert (None if default == "none" else yaml12.parse(default.strip("`"), source=key)) == rule["default"]
    unit = f" {rule['unit']}" if "unit" in rule else ""
    if "maximum" in rule:
        assert allowed == f"{rule['minimum']} to {rule['maximum']}{unit}"
    elif "minimum" in rule:
        assert allowed == f"{rule['minimum']} or more{unit}"
    elif "enum" in rule:
        assert allowed == " or ".join(f"`{value}`" for value in rule["enum"])
    else:
        assert allowed


def test_the_guide_names_every_profile_and_its_yaml_loads(tmp_path: Path) -> None:
    assert all(f"`cluster/{path.name}`" in GUIDE for path in PROFILES)
    blocks = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)
    assert len(blocks) > 1
    for block in blocks:
        load_site(profile(tmp_path, block))


@pytest.mark.parametrize("key", Site.model_fields)
def test_a_key_of_a_profile_is_explained_below_cluster(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "--explain", f"cluster.{key}"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"cluster.{key}\n  {RULES[key]['description']}\n")
    assert all(f"= {RULES[key][end]}" in text for end in ("minimum", "maximum") if end in RULES[key])


def test_explaining_cluster_lists_its_keys_and_a_misspelt_one_is_corrected(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "--explain", "cluster"]) == 0
    text = capsys.readouterr().out
    assert all(f"    {key} " in text for key in Site.model_fields)
    assert run(["config", "--explain", "cluster.partitoin"]) == 2
    assert "did you mean 'cluster.partition'?" in capsys.readouterr().err
