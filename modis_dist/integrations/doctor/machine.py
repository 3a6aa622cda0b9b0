"""Checks of this machine: versions, GPUs, space for temporary files, locks and permissions of the output folder."""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from modis_dist.integrations.ray.private_cluster import short_parent
from modis_dist.runtime.finding import Finding
from modis_dist.runtime.text import shown
from modis_dist.runtime.version import __version__

PACKAGE = "modis-dist"
SHOWN_PACKAGES = ("torch", "ray", "mlflow", "pyarrow", "submitit")
DRIVER = Path("/dev/nvidia0")
SPACE_BYTES = 2 * 10**9
GIGABYTE = 10**9
TIMEOUT_S = 30.0
TRY_LOCK = """
import fcntl, sys
try:
    fcntl.flock(open(sys.argv[1], "a"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit(3)
"""
LOCK_IS_HELD = 3


def versions(installed: Callable[[str], str] = metadata.version) -> Finding:
    """Check that every required package is installed in a supported version."""
    listed = [f"Python {sys.version.split()[0]}", f"modis_dist {__version__}"]
    listed += [f"{name} {_version(name, installed) or 'missing'}" for name in SHOWN_PACKAGES]
    try:
        requires, python = metadata.requires(PACKAGE) or [], metadata.metadata(PACKAGE)["Requires-Python"]
    except metadata.PackageNotFoundError:
        fix = "modis_dist is not installed, its requirements are unknown; run `pip install .` in its folder"
        return Finding("versions", "warning", ", ".join(listed), fix)
    wrong = [] if ".".join(map(str, sys.version_info[:3])) in SpecifierSet(python or "") else [f"Python {python}"]
    for requirement in map(Requirement, requires):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            version = _version(requirement.name, installed)
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                wrong.append(f"{requirement.name}{requirement.specifier} (installed: {version or 'missing'})")
    fix = f"modis_dist requires {'; '.join(wrong)}: run `pip install -c constraints.txt .` in its folder"
    return Finding.of("versions", ", ".join(listed), ok=not wrong, fix=fix)


def _version(name: str, installed: Callable[[str], str]) -> str | None:
    try:
        return installed(name)
    except metadata.PackageNotFoundError:
        return None


# --- GPUs -------------------------------------------------------------------------------------------------------


def gpus(*, requested: int) -> list[Finding]:
    """Check that PyTorch runs on the GPUs of this machine. ``requested``: GPUs of a job in the profile."""
    if torch.version.cuda is None:
        return [without_cuda(driver=has_driver(), requested=requested)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        return [no_gpu([str(warning.message) for warning in caught], driver=has_driver())]
    numbers = range(torch.cuda.device_count())
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return [
        kernels({f"cuda:{number}": torch.cuda.get_device_name(number) for number in numbers}),
        Finding.of(
            "bf16",
            "supported by the GPUs" if bf16 else "emulated on these GPUs",
            ok=bf16,
            fix="trainer.precision: fp16 is faster than bf16 on these GPUs",
            level="warning",
        ),
    ]


def has_driver(device: Path = DRIVER) -> bool:
    return device.exists() or shutil.which("nvidia-smi") is not None


def without_cuda(*, driver: bool, requested: int) -> Finding:
    """Report a PyTorch without CUDA: an error if there is a GPU or jobs request one."""
    message = f"PyTorch {torch.__version__} is built without CUDA"
    if driver:
        message += ", this machine has an NVIDIA driver"
    if requested:
        message += f", the profile requests {requested} GPU(s)"
    fix = "GPUs are not used: install a PyTorch build for your CUDA version (https://pytorch.org/get-started)"
    return Finding.of("GPUs", message, ok=not driver and not requested, fix=fix)


def no_gpu(caught: Sequence[str], *, driver: bool) -> Finding:
    """Report a PyTorch with CUDA that sees no GPU; ``caught``: its warnings."""
    if not driver:
        return Finding("GPUs", "ok", "none on this machine")
    message = f"NVIDIA driver found, but PyTorch sees no GPU{': ' if caught else ''}{shown('; '.join(caught))}"
    fix = (
        "check that `nvidia-smi` lists the GPUs and CUDA_VISIBLE_DEVICES is not empty; for a driver older than CUDA "
        f"{torch.version.cuda}, install a PyTorch build for an older CUDA"
    )
    return Finding("GPUs", "warning", message, fix)


def kernels(names: Mapping[str, str]) -> Finding:
    """Check that each device runs a kernel of this PyTorch build; ``names`` by device."""
    failed = [f"{device}: {error}" for device in names if (error := _kernel_error(device))]
    fix = (
        f"PyTorch {torch.__version__} cannot use this GPU: check it with `nvidia-smi`, or install a PyTorch build that "
        "supports it (https://pytorch.org/get-started)"
    )
    return Finding.of("GPUs", "; ".join([", ".join(names.values()), *failed]), ok=not failed, fix=fix)


def _kernel_error(device: str) -> str:
    try:
        torch.ones(2, device=device).sum().item()
    except RuntimeError as error:
        return shown(str(error).partition("\n")[0])
    return ""


# --- folders ----------------------------------------------------------------------------------------------------


def temporary_space() -> Finding:
    """Check that the folder for temporary files, with Ray's sockets and objects, is writable and has space."""
    folder = short_parent()
    fix = f"set TMPDIR to a folder on a local disk with {SPACE_BYTES // GIGABYTE} GB free, or delete old files there"
    if not os.access(folder, os.W_OK | os.X_OK):
        return Finding("temporary space", "error", f"{folder}: not writable", fix)
    free = shutil.disk_usage(folder).free
    message = f"{folder}: {free / GIGABYTE:.1f} GB free"
    return Finding.of("temporary space", message, ok=free >= SPACE_BYTES, fix=fix, level="warning")


def output_folder(folder: Path) -> list[Finding]:
    """Check that an output folder is writable, supports locks and can be private."""
    try:
        with tempfile.TemporaryDirectory(prefix=".modis-doctor-", dir=folder) as inside:
            return [locks(Path(inside)), permissions(Path(inside))]
    except OSError as error:
        fix = "give --out a folder that you may write to, with free space"
        return [Finding("output folder", "error", f"{shown(str(folder))}: {error.strerror}", fix)]


def locks(folder: Path) -> Finding:
    """Check that a lock of this process excludes another process."""
    path, problem = folder / "lock", ""
    try:
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            problem = "" if lock_is_held(path) else "a second process acquired the lock of the first"
        if not problem and lock_is_held(path):
            problem = "a lock is still held after its file is closed"
    except OSError as error:
        problem = f"flock: {error.strerror}"
    fix = (
        "two runs of one study could overwrite each other's results: use another folder, or mount it with locks "
        "(Lustre: -o flock; NFS: lock)"
    )
    return Finding.of("locks", shown(problem or "a lock excludes a second process"), ok=not problem, fix=fix)


def lock_is_held(path: Path) -> bool:
    """Return whether a new process cannot lock a file."""
    command = [sys.executable, "-I", "-S", "-c", TRY_LOCK, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode not in (0, LOCK_IS_HELD):
        raise OSError(0, (done.stderr.strip().splitlines() or ["no answer"])[-1])
    return done.returncode == LOCK_IS_HELD


def permissions(folder: Path) -> Finding:
    """Check that new folders can be private."""
    inside = folder / "private"
    inside.mkdir(mode=0o700)
    bits = inside.stat().st_mode & 0o777
    fix = "other users could read the data: use a file system with permissions and without default access lists"
    return Finding.of("permissions", f"new folders have mode {bits:04o}", ok=not bits & 0o077, fix=fix)
