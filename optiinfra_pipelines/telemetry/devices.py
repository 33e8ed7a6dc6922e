"""Which disks, network interfaces and file systems of a host are counted, each physical thing once.

Here: the choice by name and by mount, the same for this host's /proc and for node_exporter's page. Not here: reading.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

# loop, ram and zram are memory or files; fd and sr are not where models lie; nbd is kept: it is a disk elsewhere.
# dm-*, md* and drbd* lie on disks that are counted already; nvmeXcYnZ are the paths below a multipath nvmeXnZ.
_NOT_A_DISK = re.compile(r"^(loop|ram|zram|fd|sr|dm-|md|drbd)\d|^nvme\d+c\d+n\d+")
_PARTITION = re.compile(r"^(?P<disk>.*\d)p\d+$|^(?P<letters>.*\D)\d+$")

# lo never leaves the host; the others are the host's own plumbing (containers, bridges, tunnels) or sums over
# interfaces that are counted already (bond, team, VLANs with their dot).
_NOT_AN_INTERFACE = re.compile(
    r"^(lo\d*$|veth|docker|br-|bridge|virbr|vnet|cni|cali|cilium|lxc|flannel|weave|kube|nodelocaldns|ifb|dummy|tun|tap|wg"
    r"|tailscale|bond|team|ovs|genev|vxlan|gre|sit|ip6|erspan|nerdctl|podman|vmnet)|\."
)

_NO_STORAGE = frozenset(
    {
        "autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs", "efivarfs",
        "fuse.lxcfs", "fusectl", "hugetlbfs", "iso9660", "mqueue", "nsfs", "overlay", "proc", "pstore", "ramfs",
        "rootfs", "rpc_pipefs", "securityfs", "selinuxfs", "squashfs", "sysfs", "tmpfs", "tracefs",
    }
)  # fmt: skip
# statvfs on these waits for a server that may be gone, and the tick with it: they are not asked on this host.
_NETWORK_STORAGE = re.compile(
    r"^(nfs\d?|cifs|smb\d?|smbfs|ceph|9p|virtiofs|glusterfs|lustre|gpfs|beegfs|afs|fuse(\..+)?)$"
)
_SYSTEM_MOUNTS = ("/etc/", "/proc/", "/sys/", "/dev/", "/run/")


class Mount(NamedTuple):
    """One mounted file system. `root`: the directory of it that is mounted, "/" unless a bind mount."""

    device: str
    mount_point: str
    kind: str
    root: str = "/"


def counted_disks(names: Collection[str]) -> set[str]:
    """Whole disks. A name is a partition only where its disk is there too: some clouds call a whole disk xvda1."""
    known = set(names)
    return {name for name in known if not _NOT_A_DISK.match(name) and _disk_of(name) not in known}


def _disk_of(name: str) -> str | None:
    found = _PARTITION.match(name)
    return (found["disk"] or found["letters"]) if found else None


def is_counted_interface(name: str) -> bool:
    """True for what looks like a network card by name: eth0, ens5, enp3s0f0, ib0, wlan0."""
    return not _NOT_AN_INTERFACE.search(name)


def counted_filesystems(mounts: Iterable[Mount], *, is_local: bool) -> list[Mount]:
    """One mount per device: the whole one before a bind mount, the shortest mount point first.

    Without storage of its own (tmpfs, overlay and their like) only "/" counts: a container's root.
    `is_local`: these are to be asked here, so network file systems are left out.
    """
    best: dict[str, Mount] = {}
    for mount in mounts:
        is_root = mount.mount_point == "/"
        if not is_root and (mount.kind in _NO_STORAGE or mount.mount_point.startswith(_SYSTEM_MOUNTS)):
            continue
        if mount.device.startswith("/dev/loop") or (is_local and _NETWORK_STORAGE.match(mount.kind)):
            continue
        # Sources that are no path ("overlay", "none") say nothing of sameness.
        key = mount.device if "/" in mount.device or ":" in mount.device else f"{mount.device} {mount.mount_point}"
        if key not in best or _preference(mount) < _preference(best[key]):
            best[key] = mount
    return sorted(best.values(), key=lambda mount: mount.mount_point)


def _preference(mount: Mount) -> tuple[bool, bool, int, str]:
    return (mount.mount_point != "/", mount.root != "/", len(mount.mount_point), mount.mount_point)
