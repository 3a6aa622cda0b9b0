"""Types of file systems: the type that holds a path, and the types that are on a network, local or in memory."""

import re
from pathlib import Path

# Locks do not hold between machines on these: a reader on another node could damage an SQLite database.
NETWORK = frozenset(
    {"afs", "beegfs", "beegfs_nodev", "ceph", "cifs", "fuse.ceph", "fuse.glusterfs", "fuse.sshfs", "glusterfs", "gpfs"}
    | {"lustre", "nfs", "nfs4", "orangefs", "panfs", "pvfs2", "smb3", "smbfs", "wekafs"}
)
IN_MEMORY = frozenset({"tmpfs", "ramfs"})
# Visible to one machine only, unless it exports them.
OF_ONE_MACHINE = IN_MEMORY | {"overlay", "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs"}


def file_system(path: Path, *, mounts: Path = Path("/proc/mounts")) -> str:
    """Return the type of the file system that a path is or would be on; empty if unknown."""
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
