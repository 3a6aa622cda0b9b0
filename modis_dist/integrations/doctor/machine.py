"""What ``modis-dist doctor`` finds on this machine: versions, processors, network, folders. Does not know Slurm."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from threading import Event, Thread

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from modis_dist.execution.resources import cores
from modis_dist.integrations.ray.private_cluster import short_parent
from modis_dist.integrations.rendezvous import is_loopback
from modis_dist.runtime.errors import shown
from modis_dist.runtime.file_systems import NETWORK, file_system
from modis_dist.runtime.finding import Finding, judged
from modis_dist.runtime.version import __version__

PACKAGE = "modis-dist"
NAMED = ("torch", "ray", "mlflow", "pyarrow", "submitit")  # whose versions are told
CPU_FLAGS = Path("/proc/cpuinfo")
BF16_FLAGS = ("amx_bf16", "avx512_bf16")
DRIVER = Path("/dev/nvidia0")
SPACE_BYTES = 2 * 10**9
GIGABYTE = 10**9
REPLACEMENTS = 50
OTHERS_BITS = 0o077
ANSWER_S = 30.0
TRY_LOCK = """
import fcntl, sys
try:
    fcntl.flock(open(sys.argv[1], "a"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit(3)
"""
HELD_ELSEWHERE = 3


def versions(installed: Callable[[str], str] = metadata.version) -> Finding:
    """Whether every package we need is there, new enough and not too new."""
    own = {name: _version(name, installed) for name in NAMED}
    told = [f"Python {sys.version.split()[0]}", f"modis_dist {__version__}"]
    told += [f"{name} {version or 'missing'}" for name, version in own.items()]
    try:
        needs, python = metadata.requires(PACKAGE) or [], metadata.metadata(PACKAGE)["Requires-Python"]
    except metadata.PackageNotFoundError:
        advice = "modis_dist is not installed, so what it needs is not known; `pip install .` in its folder"
        return Finding("versions", "warning", ", ".join(told), advice)
    wrong = [] if _python_version() in SpecifierSet(python or "") else [f"Python {python}"]
    for requirement in map(Requirement, needs):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            version = _version(requirement.name, installed)
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                wrong.append(f"{requirement.name}{requirement.specifier} ({version or 'missing'} here)")
    advice = f"modis_dist needs {'; '.join(wrong)}: `pip install -c constraints.txt .` in its folder"
    return judged("versions", ", ".join(told), unless=not wrong, advice=advice)


def _version(name: str, installed: Callable[[str], str]) -> str | None:
    try:
        return installed(name)
    except metadata.PackageNotFoundError:
        return None


def _python_version() -> str:
    return ".".join(map(str, sys.version_info[:3]))


def processors() -> Finding:
    """The cores that this process may use."""
    found = f"{cores()} of {os.cpu_count()} cores may be used, {torch.get_num_threads()} thread(s) in PyTorch"
    return Finding("cores", "good", found)


def bf16_of_cpu(cpus: Path = CPU_FLAGS) -> Finding:
    """Whether the CPU multiplies bf16 by itself; where it does not, it is slower than fp32, yet right."""
    flags = set(re.findall(r"\w+", cpus.read_text())) if cpus.exists() else set()
    has = [flag.upper() for flag in BF16_FLAGS if flag in flags]
    return Finding("bf16 on CPU", "good", f"fast ({', '.join(has)})" if has else "emulated, so fp32 is faster on CPU")


def gpus(*, wanted: int) -> list[Finding]:
    """The GPUs of this machine, and whether this PyTorch runs on them. ``wanted`` is what jobs ask for on a node."""
    if torch.version.cuda is None:
        return [without_cuda(driver=has_driver(), wanted=wanted)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        there = torch.cuda.is_available()
    if not there:
        return [no_gpu([str(one.message) for one in said], driver=has_driver())]
    each = range(torch.cuda.device_count())
    devices = [(torch.cuda.get_device_name(one), torch.cuda.get_device_capability(one)) for one in each]
    return [architecture(devices, torch.cuda.get_arch_list(), build=str(torch.__version__)), bf16_of_gpu()]


def has_driver(device: Path = DRIVER) -> bool:
    """Whether NVIDIA's driver is on this machine."""
    return device.exists() or shutil.which("nvidia-smi") is not None


def without_cuda(*, driver: bool, wanted: int) -> Finding:
    """Of a PyTorch without CUDA: a mistake where there is a GPU, or where jobs ask for one."""
    found = f"PyTorch {torch.__version__} is built without CUDA"
    if driver:
        found += ", and this machine has NVIDIA's driver"
    if wanted:
        found += f", and the profile asks for {wanted} GPU(s)"
    advice = "GPUs stay idle: install a build of PyTorch for your CUDA (https://pytorch.org/get-started)"
    return judged("GPUs", found, unless=not driver and not wanted, advice=advice)


def no_gpu(said: Sequence[str], *, driver: bool) -> Finding:
    """Of a PyTorch with CUDA that sees no GPU; ``said`` is what it warned of."""
    if not driver:
        return Finding("GPUs", "good", "none on this machine")
    found = f"PyTorch sees none, though NVIDIA's driver is there{': ' if said else ''}{shown('; '.join(said))}"
    advice = (
        "see whether `nvidia-smi` lists them and CUDA_VISIBLE_DEVICES is not empty; a driver older than CUDA "
        f"{torch.version.cuda} needs a build of PyTorch for an older CUDA"
    )
    return Finding("GPUs", "warning", found, advice)


def architecture(devices: Sequence[tuple[str, tuple[int, int]]], built_for: Sequence[str], *, build: str) -> Finding:
    """Whether a build of PyTorch holds code for each device, given by its name and compute capability."""
    told = ", ".join(f"{name} (sm_{major}{minor})" for name, (major, minor) in devices)
    alien = [f"sm_{major}{minor}" for _, (major, minor) in devices if not _runs((major, minor), built_for)]
    advice = (
        f"PyTorch {build} has no code for {', '.join(dict.fromkeys(alien))} (it has {', '.join(built_for)}): install a "
        "build that has (https://pytorch.org/get-started)"
    )
    return judged("GPUs", told, unless=not alien, advice=advice)


def _runs(capability: tuple[int, int], built_for: Sequence[str]) -> bool:
    """Machine code runs on later devices of its generation, PTX on all later ones; with an ``a`` on its own only."""
    for kind, major, minor, only in re.findall(r"\b(sm|compute)_(\d+)(\d)(a?)\b", " ".join(built_for)):
        of = (int(major), int(minor))
        if of == capability or (not only and of < capability and (kind == "compute" or of[0] == capability[0])):
            return True
    return False


def bf16_of_gpu() -> Finding:
    """Whether the GPUs compute bf16 by themselves."""
    advice = "trainer.precision: fp16 is faster on these GPUs"
    fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return judged("bf16 on GPU", "yes" if fast else "emulated", unless=fast, advice=advice, level="warning")


def loopback() -> Finding:
    """Whether processes of this machine can talk to each other: Ray, MLflow's pages and ranks do."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = server.getsockname()
            with socket.create_connection(address, timeout=ANSWER_S):
                return Finding("loopback", "good", f"port {address[1]} of 127.0.0.1 was free and is reached")
    except OSError as error:
        advice = "nothing can be trained on Ray: have the loopback interface (lo) up and 127.0.0.1 free of a firewall"
        return Finding("loopback", "bad", f"127.0.0.1: {error}", advice)


def host_name(*, nodes: int) -> Finding:
    """What this machine's name leads to, which matters to the other ``nodes`` of an allocation."""
    name = socket.gethostname()
    try:
        told = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError as error:
        advice = "name it in /etc/hosts, or in the site's DNS"
        return Finding("host name", "warning", f"{shown(name)} does not resolve: {error.strerror}", advice)
    addresses = list(dict.fromkeys(str(one[4][0]) for one in told))
    found = f"{shown(name)} is {', '.join(addresses)}"
    local = all(map(is_loopback, addresses))
    advice = (
        "on several nodes this name leads each node to itself: have the site's DNS or /etc/hosts give its address in "
        "the network between them"
    )
    return judged("host name", found, unless=nodes < 2 or not local, advice=advice, level="warning")


def temporary_folder(*, scratch: str | None) -> list[Finding]:
    """Where temporary files go: Ray's sockets, above all. ``scratch`` is what jobs use on their nodes."""
    folder, usual = short_parent(), Path(tempfile.gettempdir())
    found = f"{folder} ({file_system(folder) or 'unknown file system'})"
    if folder != usual:
        found += f", as the path of {usual} is too long for the sockets of Ray"
    if scratch is not None:
        found += f"; jobs use {scratch} of their node"
    own = "set TMPDIR to a folder on a disk of this machine"
    if not os.access(folder, os.W_OK | os.X_OK):
        return [Finding("temporary files", "bad", f"{found}, where nothing can be written", own)]
    local = file_system(folder) not in NETWORK
    return [
        judged("temporary files", found, unless=local, advice=f"{own}: this one is in the network", level="warning"),
        _space(folder, shutil.disk_usage(folder).free),
    ]


def _space(folder: Path, free: int) -> Finding:
    advice = f"remove what is old there, or set TMPDIR to a folder with {SPACE_BYTES // GIGABYTE} GB for Ray's objects"
    found = f"{free / GIGABYTE:.1f} GB free in {folder}"
    return judged("temporary space", found, unless=free >= SPACE_BYTES, advice=advice, level="warning")


def folder_of_runs(folder: Path) -> list[Finding]:
    """The folder where results go: where it is, and whether it keeps what we build on."""
    found = [kind_of_folder(folder, file_system(folder))]
    try:
        with tempfile.TemporaryDirectory(prefix=".modis-doctor-", dir=folder) as inside:
            return [*found, locking(Path(inside)), renaming(Path(inside)), privacy(Path(inside))]
    except OSError as error:
        advice = "go to a folder of your own with space left, and start there"
        return [*found, Finding("writing", "bad", f"{shown(str(folder))}: {error.strerror}", advice)]


def kind_of_folder(folder: Path, kind: str) -> Finding:
    """On what file system results go; on one in the network MLflow's SQLite is not taken."""
    found = f"{shown(str(folder))} is on {kind or 'an unknown file system'}"
    advice = (
        "SQLite would be damaged in the network: here a study keeps its journals and MLflow gets them later, by "
        "`modis-dist fetch`; or set sweep.mlflow.uri to a server"
    )
    if kind in NETWORK:
        found += ", in the network"
    return judged("results", found, unless=kind not in NETWORK, advice=advice, level="warning")


def locking(folder: Path) -> Finding:
    """Whether a lock keeps another process out, tried with one."""
    import fcntl

    path = folder / "lock"
    try:
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            excluded = _locked_for_others(path)
        freed = not _locked_for_others(path)
    except OSError as error:
        return _no_locks(f"flock: {error.strerror}")
    if not excluded or not freed:
        return _no_locks("a second process got the lock of the first" if not excluded else "a lock outlived its owner")
    return Finding("locks", "good", "a second process is kept out, and let in afterwards")


def _locked_for_others(path: Path) -> bool:
    command = [sys.executable, "-I", "-S", "-c", TRY_LOCK, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=False)
    if done.returncode not in (0, HELD_ELSEWHERE):
        raise OSError(0, (done.stderr.strip().splitlines() or ["no answer"])[-1])
    return done.returncode == HELD_ELSEWHERE


def _no_locks(found: str) -> Finding:
    advice = (
        "two starts of one study would damage each other: use another folder, or have it mounted with locks "
        "(Lustre: -o flock; NFS: lock)"
    )
    return Finding("locks", "bad", shown(found), advice)


def renaming(folder: Path) -> Finding:
    """Whether a file can be replaced while it is read, without a reader ever missing it."""
    path, torn, over = folder / "replaced", Event(), Event()
    path.write_text("whole")

    def read() -> None:
        while not over.is_set():
            try:
                whole = path.read_text() == "whole"
            except OSError:
                whole = False
            if not whole:
                torn.set()

    reader = Thread(target=read)
    reader.start()
    try:
        for _ in range(REPLACEMENTS):
            (folder / "new").write_text("whole")
            (folder / "new").replace(path)
    finally:
        over.set()
        reader.join()
    found = "a file was missed or torn while it was replaced" if torn.is_set() else "files are replaced in one step"
    advice = "results could be read by halves: use a folder on another file system"
    return judged("renaming", found, unless=not torn.is_set(), advice=advice)


def privacy(folder: Path) -> Finding:
    """Whether what we write can be kept from others."""
    inside = folder / "private"
    inside.mkdir(mode=0o700)
    bits = inside.stat().st_mode & 0o777
    advice = "other users could read the data: use a file system with permissions, without default access lists"
    return judged("permissions", f"folders are made with {bits:04o}", unless=not bits & OTHERS_BITS, advice=advice)
