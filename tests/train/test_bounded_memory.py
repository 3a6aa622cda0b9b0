"""A training with features on disk needs little memory and leaves no file, however it ends."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from modis_dist import metrics
from modis_dist.config import yaml12
from modis_dist.config.parse import load_run
from modis_dist.data.store import arrays
from modis_dist.data.store.arrays import FeatureStorage
from modis_dist.data.store.writer import StoreWriter
from modis_dist.evaluate import predictor
from modis_dist.evaluate.evaluation import plain_baseline
from modis_dist.execution.single import train_run
from modis_dist.execution.verify_resume import differences
from modis_dist.train import validation
from modis_dist.train.callbacks import NeverStop, NullReporter
from tests.bare import skip_figures
from tests.train import toy

WIDE_ROWS, WIDE_FEATURES = 20_000, 1_000  # 76 MiB in each of two modalities
MIB = 2**20


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a run on 153 MiB of features, with small networks."""
    folder = tmp_path_factory.mktemp("wide")
    rng = np.random.default_rng(0)
    with StoreWriter(folder / "store", source={"kind": "test"}) as writer:
        for modality in ("rna", "methylation"):
            writer.begin(modality, [f"g{i}" for i in range(WIDE_FEATURES)])
            for start in range(0, WIDE_ROWS, 1000):
                numbers = range(start, start + 1000)
                ids = [f"s{i}" for i in numbers]
                label = [toy.CLASSES[i % 3] if i % 20 == 0 else None for i in numbers]
                x = rng.integers(0, 9, (1000, WIDE_FEATURES)).astype(np.float32)
                writer.write(modality, sample_id=ids, group_id=ids, label=label, split=[""] * 1000, x=x)
    tree = json.loads(json.dumps(toy.TREE)) | {"model": {"latent": 4, "ratios": [0.01], "discriminator": [8]}}
    tree["data"]["store"] = str(folder / "store")
    tree["optim"] = {"epochs": 1, "batch_size": 200}
    (folder / "run.yaml").write_text(yaml12.dump(tree))
    return folder


def peak_of_training(folder: Path, storage: FeatureStorage, out: Path) -> int:
    """Return the MiB of anonymous memory that a training adds to its process; file pages can be dropped."""
    code = "import sys; from tests.train import test_bounded_memory as tests; tests.train_and_print_peak(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(folder / "run.yaml"), storage, str(out)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout + child.stderr
    return int(child.stdout.split()[-1])


def train_and_print_peak(file: str, storage: str, out: str) -> None:
    """Train and evaluate in a separate process, and print the peak."""
    arrays.VALUES_PER_BLOCK = 1 << 18
    metrics.BLOCK_ROWS = predictor.ROWS_AT_ONCE = validation.ROWS_AT_ONCE = 128
    skip_figures()
    run = load_run(Path(file), [f"trainer.feature_storage={storage}"])
    first = Path(out).with_suffix(".first")  # a first training imports and allocates everything that stays
    toy.train([member := toy.member("first", toy.run("optim.epochs=1"), first)], first)
    plain_baseline(member.prepared, member.prepared.validation)
    peaks = [anonymous()]
    Thread(target=watch, args=(peaks,), daemon=True).start()
    train_run(run, out=Path(out), source=file, reporter=NullReporter(), stop=NeverStop())
    sys.stdout.write(f"{(max(peaks) - peaks[0]) // MIB}\n")


def watch(peaks: list[int]) -> None:
    """Record the memory use forever."""
    while True:
        peaks.append(anonymous())
        time.sleep(0.005)


def anonymous() -> int:
    """Return the bytes of anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


@pytest.mark.slow
def test_features_on_disk_take_less_memory_than_their_size_and_those_in_memory_more_than_twice_their_size(
    wide: Path, tmp_path: Path
) -> None:
    on_disk, in_memory = (peak_of_training(wide, storage, tmp_path / storage) for storage in ("disk", "memory"))
    data = 2 * WIDE_ROWS * WIDE_FEATURES * 4 // MIB
    assert on_disk < data < 2 * data < in_memory, (on_disk, data, in_memory)
    assert differences(tmp_path / "disk", tmp_path / "memory") == []


def test_a_killed_training_with_features_on_disk_leaves_nothing_in_the_temporary_folder(
    wide: Path, tmp_path: Path
) -> None:
    file, out, scratch = wide / "run.yaml", tmp_path / "killed", tmp_path / "scratch"
    scratch.mkdir()
    options = ["--set", "trainer.feature_storage=disk", "--set", "optim.epochs=1000", "--out", str(out)]
    child = subprocess.Popen(
        [sys.executable, "-m", "modis_dist", "train", str(file), *options],
        env=os.environ | {"TMPDIR": str(scratch)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: (out / "last").is_dir() or child.poll() is not None)
        mapped = Path(f"/proc/{child.pid}/maps").read_text().count(str(scratch))
        assert mapped == 4, "training and validation rows of two modalities"
    finally:
        child.kill()
        child.wait()
    assert [path for path in scratch.iterdir() if path.is_file()] == []


def wait_until(true: Callable[[], bool], *, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.05)
