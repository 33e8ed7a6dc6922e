"""A kernel made of files: /proc and /sys trees that a test writes and a collector reads."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

STAT = """cpu  1000 50 300 9000 200 10 20 70 400 5
cpu0 500 25 150 4500 100 5 10 35 200 2
cpu1 500 25 150 4500 100 5 10 35 200 3
intr 12345 0 0 9
ctxt 777
btime 1700000000
processes 99
procs_running 2
procs_blocked 3
"""
MEMINFO = """MemTotal:       16000000 kB
MemFree:         1000000 kB
MemAvailable:   12000000 kB
SwapCached:            4 kB
SwapTotal:       2000000 kB
SwapFree:        1500000 kB
HugePages_Total:       0
"""
VMSTAT = """nr_free_pages 5
pgmajfault 42
pswpin 7
pswpout 9
oom_kill 1
oom_kill_other 99
"""
PRESSURE = """some avg10=0.00 avg60=0.00 avg300=0.00 total=2500000
full avg10=0.00 avg60=0.00 avg300=0.00 total=500000
"""
SNMP = """Ip: Forwarding DefaultTTL
Ip: 1 64
Tcp: RtoAlgorithm RtoMin RtoMax MaxConn ActiveOpens RetransSegs InErrs
Tcp: 1 200 120000 -1 933 280 0
Udp: InDatagrams
Udp: 5
"""
DISKSTATS = """   7       0 loop0 1 0 8 1 0 0 0 0 0 1 1
 259       0 nvme0n1 100 5 2000 3000 200 6 4000 5000 0 6000 8000 0 0 0 0 0 0
 259       1 nvme0n1p1 90 5 1900 2900 190 6 3900 4900 0 5900 7900 0 0 0 0 0 0
 259       2 nvme0n1p2 10 0 100 100 10 0 100 100 0 100 100
 253       0 dm-0 100 0 2000 3000 200 0 4000 5000 0 6000 8000
   8      16 sdb1 1 2 3 4
"""
NET_DEV = """Inter-|   Receive                                                |  Transmit
 face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier compressed
    lo:    3193      29    0    0    0     0          0         0     3193      29    0    0    0    0      0         0
  eth0:4294967290 34964    1    2    0     0          0         0  1157575   11203    4    8    0    0      0         0
docker0: 5 1 0 0 0 0 0 0 6 1 0 0 0 0 0 0
"""


@dataclass
class Kernel:
    """Roots of the two trees. Every file can be rewritten or removed by the test."""

    proc: Path
    sys: Path

    def write(self, name: str, text: str) -> None:
        path = self.proc / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def write_sys(self, name: str, text: str) -> None:
        path = self.sys / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def remove(self, name: str) -> None:
        (self.proc / name).unlink()

    def process(
        self, pid: int, *, name: str = "python", parent: int = 1, group: int | None = None, started: int = 5000
    ) -> None:
        """A process with 1.5 s of CPU time, 3 threads, 2 s of waiting for a CPU and 2 open files."""
        fields = [parent, group or pid, group or pid, *[0] * 7, 100, 50, *[0] * 4, 3, 0, started, 0, 512, *[0] * 28]
        self.write(f"{pid}/stat", f"{pid} ({name}) S {' '.join(map(str, fields))}\n")
        self.write(
            f"{pid}/status",
            f"Name:\t{name}\nVmRSS:\t    2048 kB\nvoluntary_ctxt_switches:\t11\nnonvoluntary_ctxt_switches:\t22\n",
        )
        self.write(f"{pid}/schedstat", "9000000000 2000000000 55\n")
        self.write(f"{pid}/cmdline", name)
        for number in range(2):
            self.open_file(pid, number, "/dev/null")

    def process_again(self, pid: int, *, started: int) -> None:
        """Another process under the same pid."""
        shutil.rmtree(self.proc / str(pid))
        self.process(pid, started=started)

    def open_file(self, pid: int, number: int, target: str) -> None:
        folder = self.proc / str(pid) / "fd"
        folder.mkdir(exist_ok=True)
        (folder / str(number)).symlink_to(target)

    def listen(self, sockets: dict[int, int]) -> None:
        """port -> inode of listening sockets, and one established connection that is none."""
        lines = ["  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode"]
        lines += [
            f"   0: 0100007F:{port:04X} 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 {inode} 1 0"
            for port, inode in sockets.items()
        ]
        lines.append("   1: 0100007F:1F40 0100007F:A000 01 00000000:00000000 00:00000000 00000000 0 0 4242 1 0")
        self.write("net/tcp", "\n".join(lines) + "\n")


def make_kernel(root: Path) -> Kernel:
    """A host with two CPUs, one NVMe disk with partitions and LVM, one card, a container bridge, and PSI."""
    kernel = Kernel(root / "proc", root / "sys")
    kernel.write("stat", STAT)
    kernel.write("loadavg", "1.25 1.00 0.90 2/345 6789\n")
    kernel.write("meminfo", MEMINFO)
    kernel.write("vmstat", VMSTAT)
    for what in ("cpu", "memory", "io"):
        kernel.write(f"pressure/{what}", PRESSURE)
    kernel.write("net/snmp", SNMP)
    kernel.write("net/dev", NET_DEV)
    kernel.write("diskstats", DISKSTATS)
    kernel.write("sys/kernel/random/boot_id", "efb90e07-1f9b-4762-b3d5-1c0163bf261c\n")
    kernel.write("self/mountinfo", f"27 1 254:0 / {root} rw - ext4 /dev/nvme0n1p1 rw\n")
    kernel.write("self/cgroup", "0::/\n")
    (kernel.sys / "class" / "net" / "eth0" / "device").mkdir(parents=True)
    (kernel.sys / "fs" / "cgroup").mkdir(parents=True)
    return kernel
