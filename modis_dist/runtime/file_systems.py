"""Lookup of the file system type of a path."""

import re
from pathlib import Path


def file_system(path: Path, *, mounts: Path = Path("/proc/mounts")) -> str:
    """Return the type of the file system that holds a path, which need not exist; empty if it is unknown."""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return ""
    mount_point, kind, target = "", "", path.resolve()
    for _device, folder, folder_kind, *_rest in map(str.split, lines):
        folder = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), folder)
        if target.is_relative_to(folder) and len(folder) >= len(mount_point):
            mount_point, kind = folder, folder_kind
    return kind
