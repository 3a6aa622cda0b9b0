"""Kinds of file systems: which hold a path, and which are of a network, of one machine or in memory."""

import re
from pathlib import Path

# Locks do not hold between machines there: SQLite would be damaged by a reader on another node.
NETWORK = frozenset(
    {"afs", "beegfs", "beegfs_nodev", "ceph", "cifs", "fuse.ceph", "fuse.glusterfs", "fuse.sshfs", "glusterfs", "gpfs"}
    | {"lustre", "nfs", "nfs4", "orangefs", "panfs", "pvfs2", "smb3", "smbfs", "wekafs"}
)
IN_MEMORY = frozenset({"tmpfs", "ramfs"})
# Unless the machine exports them to others.
OF_ONE_MACHINE = IN_MEMORY | {"overlay", "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs"}


def file_system(path: Path, *, mounts: Path = Path("/proc/mounts")) -> str:
    """Return the kind of file system that a path is or would be on; empty if the system does not say."""
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
