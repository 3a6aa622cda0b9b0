"""Whole output of `submit --dry-run` for the paper's TCGA grid, with fixed times instead of measured ones."""

import sys
from pathlib import Path

import numpy as np
import pytest

from modis_dist.cli.main import run as command
from modis_dist.data.store.writer import StoreWriter
from modis_dist.integrations.slurm import queue
from modis_dist.planning import timing
from modis_dist.runtime.version import __version__
from modis_dist.train import prepare
from tests.integrations.slurm.fake_slurm import PROGRAMS

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = Path(__file__).parent / "golden"
FEATURES = {"methylation": 2500, "mrna": 2500, "mirna": 542}  # of table S2, after the paper's PCA
ROWS = 400


@pytest.fixture(scope="module")
def tcga(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random store with the paper's features and few rows."""
    folder, random = tmp_path_factory.mktemp("tcga") / "store", np.random.default_rng(0)
    with StoreWriter(folder, source={"kind": "random"}) as store:
        for modality, features in FEATURES.items():
            store.begin(modality, [f"{modality}{i}" for i in range(features)])
            ids = [f"{modality}-{row}" for row in range(ROWS)]
            labels = [f"c{row % 10}" for row in range(ROWS)]
            x = random.normal(size=(ROWS, features)).astype(np.float32)
            store.write(modality, sample_id=ids, group_id=ids, label=labels, split=[""] * ROWS, x=x)
    return folder


def test_the_fake_slurm_has_every_program_that_is_used() -> None:
    assert {*queue.PROGRAMS, "sacct", "sinfo"} <= set(PROGRAMS)


@pytest.mark.parametrize("profile", ["generic_gpu", "jean_zay"])
@pytest.mark.usefixtures("slurm")
def test_the_dry_run_of_the_papers_grid_prints_its_golden_file(
    profile: str,
    tcga: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(timing, "seconds_per_step", lambda runs, _: 0.01 * len(runs))
    monkeypatch.setattr(timing, "seconds_per_row", lambda runs, _: 1e-5 * len(runs))
    monkeypatch.setattr(timing, "seconds_per_save", lambda size, _: size / 5e8)
    monkeypatch.setattr(prepare, "perf_counter", lambda: 0.0)
    site = tmp_path / "site.yaml"
    site.write_text((ROOT / "cluster" / f"{profile}.yaml").read_text().replace("CHANGE_ME", "mine"))
    words = ["submit", str(ROOT / "tune_spaces" / "tcga10.yaml"), "--cluster", str(site), "--out", "/scratch/me/tcga10"]
    few_rows = "preprocess.modalities={methylation: [standardise], mrna: [standardise], mirna: [standardise]}"
    assert command([*words, "--set", f"data.store={tcga}", "--set", few_rows, "--dry-run"]) == 0
    stdout = (
        capsys.readouterr()
        .out.replace(sys.executable, "python3")
        .replace(f"modis-dist {__version__}", "modis-dist VERSION")
    )
    assert stdout.splitlines() == (GOLDEN / f"tcga10_{profile}.txt").read_text().splitlines()
