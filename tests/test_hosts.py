"""This host's telemetry, from kernels written by the tests and from the real one."""

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import psutil
import pytest

from optiinfra_pipelines.sql.sources import raw_tables
from resources.host.host import HostCollector
from tests.telemetry.kernel import DISKSTATS, NET_DEV, STAT, Kernel, make_kernel

NOW = datetime(2026, 11, 20, 15, 0, tzinfo=UTC)
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
Row = dict[str, object]


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return make_kernel(tmp_path)


def collector(kernel: Kernel) -> HostCollector:
    return HostCollector("here", kernel.proc, kernel.sys, monotonic=lambda: 12.5)


def sample(frames: dict[str, pl.DataFrame]) -> Row:
    (row,) = frames["raw_host_samples"].to_dicts()
    return row


def outcome(frames: dict[str, pl.DataFrame]) -> Row:
    (row,) = frames["raw_host_collections"].to_dicts()
    return row


def devices(frames: dict[str, pl.DataFrame], kind: str) -> dict[str, Row]:
    rows = frames["raw_host_devices"].filter(pl.col("kind") == kind).to_dicts()
    return {row["device"]: row for row in rows}


def processes(frames: dict[str, pl.DataFrame]) -> dict[int, Row]:
    return {row["pid"]: row for row in frames["raw_host_processes"].to_dicts()}


def test_a_whole_kernel_is_read(kernel: Kernel) -> None:
    """Each column from its file, by hand."""
    frames = collector(kernel).collect(NOW)
    row = sample(frames)

    assert row["boot_id"] == "efb90e07-1f9b-4762-b3d5-1c0163bf261c"
    assert row["booted_at"] == datetime.fromtimestamp(1700000000, UTC)
    assert row["monotonic_seconds"] == 12.5
    assert row["cpu_count"] == 2
    assert row["cpu_user_seconds_total"] == 1050 / TICKS, "guest (400) lies within user and is not added"
    assert row["cpu_system_seconds_total"] == 330 / TICKS
    assert row["cpu_idle_seconds_total"] == 9000 / TICKS
    assert row["cpu_iowait_seconds_total"] == 200 / TICKS
    assert row["cpu_steal_seconds_total"] == 70 / TICKS
    assert (row["context_switches_total"], row["processes_blocked"], row["load_1m"]) == (777, 3, 1.25)
    assert row["memory_total_bytes"] == 16000000 * 1024
    assert row["memory_available_bytes"] == 12000000 * 1024
    assert row["swap_used_bytes"] == 500000 * 1024
    assert (row["swap_in_bytes_total"], row["swap_out_bytes_total"]) == (7 * PAGE, 9 * PAGE)
    assert (row["major_faults_total"], row["oom_kills_total"]) == (42, 1)
    assert (row["psi_cpu_some_seconds_total"], row["psi_io_full_seconds_total"]) == (2.5, 0.5)
    assert row["tcp_retransmits_total"] == 280
    assert (outcome(frames)["status"], outcome(frames)["error_count"]) == ("ok", 0)
    assert set(frames) == {"raw_host_samples", "raw_host_devices", "raw_host_processes", "raw_host_collections"}
    for name, frame in frames.items():
        assert frame.schema == raw_tables()[name].polars_schema


def test_whole_disks_and_real_cards(kernel: Kernel, tmp_path: Path) -> None:
    """Partitions, LVM and loops repeat the disk; lo and docker0 never leave the host."""
    frames = collector(kernel).collect(NOW)

    disks, cards = devices(frames, "disk"), devices(frames, "network")
    assert list(disks) == ["nvme0n1"]
    disk = disks["nvme0n1"]
    assert (disk["reads_total"], disk["read_bytes_total"], disk["read_seconds_total"]) == (100, 2000 * 512, 3.0)
    assert (disk["writes_total"], disk["write_bytes_total"], disk["write_seconds_total"]) == (200, 4000 * 512, 5.0)
    assert disk["busy_seconds_total"] == 6.0
    assert list(cards) == ["eth0"]
    card = cards["eth0"]
    assert (card["read_bytes_total"], card["write_bytes_total"]) == (4294967290, 1157575)
    assert (card["errors_total"], card["drops_total"]) == (1 + 4, 2 + 8)
    (mount,) = devices(frames, "filesystem").values()
    assert mount["size_bytes"] == psutil.disk_usage(str(tmp_path)).total
    assert mount["size_bytes"] != mount["available_bytes"]


def test_a_container_without_psi_swap_or_boot_id(kernel: Kernel) -> None:
    """What a kernel does not have is NULL and no failure; the rest is there."""
    for name in ("pressure/cpu", "pressure/memory", "pressure/io", "sys/kernel/random/boot_id", "diskstats", "vmstat"):
        kernel.remove(name)
    frames = collector(kernel).collect(NOW)
    row = sample(frames)

    assert [row[name] for name in row if name.startswith("psi_")] == [None] * 5
    assert (row["boot_id"], row["oom_kills_total"]) == (None, None)
    assert row["cpu_idle_seconds_total"] == 9000 / TICKS
    assert devices(frames, "disk") == {}
    assert outcome(frames)["status"] == "ok"


def test_an_empty_proc_gives_a_row_of_nulls(tmp_path: Path) -> None:
    """Even then the tick says that it was."""
    frames = HostCollector("here", tmp_path / "no", tmp_path / "none").collect(NOW, [1], [80])
    row = sample(frames)

    known = {"sampled_at", "host", "telemetry", "source", "monotonic_seconds"}
    assert {name for name, value in row.items() if value is not None} == known


@pytest.mark.parametrize("name", ["stat", "meminfo", "net/dev", "diskstats", "loadavg", "pressure/io", "net/snmp"])
@pytest.mark.parametrize("content", ["", "\n", "garbage", "cpu x\nMemTotal: x kB\nTcp: a RetransSegs\nTcp: 1 x\n"])
def test_one_broken_file_never_loses_the_rest(kernel: Kernel, name: str, content: str) -> None:
    """A kernel with something new in one file costs that file's columns only."""
    whole = sample(collector(kernel).collect(NOW))
    kernel.write(name, content)
    row = sample(collector(kernel).collect(NOW))
    columns = [column for column in whole if column not in {"booted_at"}]

    lost = {column for column in columns if row[column] != whole[column]}
    assert all(row[column] is None for column in lost)
    assert len(lost) <= 8, "the columns of one file"


def test_an_unreadable_file_is_counted(kernel: Kernel) -> None:
    """Not there is calm; there and refused is told, with its name."""
    kernel.remove("loadavg")
    (kernel.proc / "loadavg").mkdir()
    found = outcome(collector(kernel).collect(NOW))

    assert (found["status"], found["error_count"]) == ("partial", 1)
    assert found["detail"] == "could not read loadavg"


def test_an_old_kernel_without_steal(kernel: Kernel) -> None:
    """Modes that a kernel does not count are NULL, not zero."""
    kernel.write("stat", STAT.replace(" 70 400 5\n", "\n", 1))

    row = sample(collector(kernel).collect(NOW))
    assert row["cpu_steal_seconds_total"] is None
    assert row["cpu_system_seconds_total"] == 330 / TICKS


def test_a_counter_that_wraps_is_written_as_it_is(kernel: Kernel) -> None:
    """A 32-bit counter of a card goes back to the start; making sense of that is SQL's."""
    here = collector(kernel)
    here.collect(NOW)
    kernel.write("net/dev", NET_DEV.replace("4294967290", "         7"))

    assert devices(here.collect(NOW + timedelta(seconds=5)), "network")["eth0"]["read_bytes_total"] == 7


def test_a_card_in_a_container_has_no_device(kernel: Kernel) -> None:
    """Where no interface has hardware behind it, those named like a card count."""
    (kernel.sys / "class" / "net" / "eth0" / "device").rmdir()

    assert list(devices(collector(kernel).collect(NOW), "network")) == ["eth0"]


def test_a_mount_point_with_a_space(kernel: Kernel, tmp_path: Path) -> None:
    """The kernel writes a space as an octal escape."""
    (tmp_path / "my models").mkdir()
    kernel.write("self/mountinfo", f"27 1 8:1 / {tmp_path}/my\\040models rw - xfs /dev/sdc1 rw\nbroken\n")

    assert list(devices(collector(kernel).collect(NOW), "filesystem")) == [f"{tmp_path}/my models"]


def test_disks_that_come_and_go(kernel: Kernel) -> None:
    """A hot-plugged disk is there in the next tick."""
    here = collector(kernel)
    here.collect(NOW)
    kernel.write("diskstats", DISKSTATS + "   8       0 sda 1 0 2 3 4 0 5 6 0 7 8\n")

    assert list(devices(here.collect(NOW), "disk")) == ["nvme0n1", "sda"]


def test_limits_of_cgroup_v2(kernel: Kernel) -> None:
    """A quota of 1.5 cores, and how often it bit."""
    kernel.write("self/cgroup", "0::/system.slice/optiinfra.service\n")
    kernel.write_sys("fs/cgroup/cgroup.controllers", "cpu memory\n")
    own = "fs/cgroup/system.slice/optiinfra.service"
    kernel.write_sys(f"{own}/cpu.max", "150000 100000\n")
    kernel.write_sys(f"{own}/cpu.stat", "usage_usec 9\nnr_periods 10\nnr_throttled 4\nthrottled_usec 2500000\n")
    kernel.write_sys(f"{own}/memory.max", "max\n")
    kernel.write_sys(f"{own}/memory.current", "4096\n")
    kernel.write_sys("fs/cgroup/system.slice/memory.max", "8192\n")
    kernel.write_sys("fs/cgroup/system.slice/memory.current", "6000\n")
    kernel.write_sys("fs/cgroup/system.slice/memory.events", "low 0\noom 3\noom_kill 2\n")
    row = sample(collector(kernel).collect(NOW))

    assert row["cgroup_cpu_limit_cores"] == 1.5
    assert (row["cgroup_cpu_throttled_seconds_total"], row["cgroup_cpu_throttled_periods_total"]) == (2.5, 4)
    assert row["cgroup_memory_limit_bytes"] == 8192, "the slice above sets the limit that counts"
    assert (row["cgroup_memory_used_bytes"], row["cgroup_oom_kills_total"]) == (6000, 2)


def test_a_container_sees_its_own_cgroup_as_the_root(kernel: Kernel) -> None:
    """Without a cgroup namespace the path is the host's, and does not exist in the container's mount."""
    kernel.write("self/cgroup", "0::/kubepods/pod1/abc\n")
    kernel.write_sys("fs/cgroup/cgroup.controllers", "cpu memory\n")
    kernel.write_sys("fs/cgroup/cpu.max", "max 100000\n")
    kernel.write_sys("fs/cgroup/memory.max", "1000\n")
    row = sample(collector(kernel).collect(NOW))

    assert (row["cgroup_cpu_limit_cores"], row["cgroup_memory_limit_bytes"]) == (None, 1000)


def test_limits_of_a_hybrid_host(kernel: Kernel) -> None:
    """Version 1 controllers beside an empty version 2 tree; the largest number there is means no limit."""
    kernel.write("self/cgroup", "4:memory:/job\n2:cpu,cpuacct:/job\n1:name=systemd:/x\n0::/x\n")
    kernel.write_sys("fs/cgroup/unified/cgroup.controllers", "\n")
    kernel.write_sys("fs/cgroup/cpu/job/cpu.cfs_quota_us", "50000\n")
    kernel.write_sys("fs/cgroup/cpu/job/cpu.cfs_period_us", "100000\n")
    kernel.write_sys("fs/cgroup/cpu/job/cpu.stat", "nr_periods 5\nnr_throttled 3\nthrottled_time 4000000000\n")
    kernel.write_sys("fs/cgroup/memory/job/memory.limit_in_bytes", "9223372036854771712\n")
    kernel.write_sys("fs/cgroup/memory/job/memory.usage_in_bytes", "777\n")
    kernel.write_sys("fs/cgroup/memory/job/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 6\n")
    row = sample(collector(kernel).collect(NOW))

    assert row["cgroup_cpu_limit_cores"] == 0.5
    assert (row["cgroup_cpu_throttled_seconds_total"], row["cgroup_cpu_throttled_periods_total"]) == (4, 3)
    assert row["cgroup_memory_limit_bytes"] is None
    assert (row["cgroup_memory_used_bytes"], row["cgroup_oom_kills_total"]) == (777, 6)
    kernel.write_sys("fs/cgroup/cpu/job/cpu.cfs_quota_us", "-1\n")
    assert sample(collector(kernel).collect(NOW))["cgroup_cpu_limit_cores"] is None


def test_a_gpu_process_and_its_family(kernel: Kernel) -> None:
    """A worker holds the GPU; its core and API server are its parents, the shell above is of another job."""
    kernel.process(100, name="bash", group=100)
    kernel.process(200, name="vllm", parent=100, group=200)
    kernel.process(201, name="VLLM::EngineCor", parent=200, group=200)
    kernel.write("201/cmdline", "VLLM::EngineCore_DP0\0")
    kernel.process(202, name="VLLM::Worker (0)", parent=201, group=200)
    kernel.process(300, name="cron")
    found = processes(collector(kernel).collect(NOW, watch_pids=[202, 99999]))

    assert {pid: row["role"] for pid, row in found.items()} == {202: "gpu", 201: "relative", 200: "relative"}
    worker = found[202]
    assert worker["name"] == "VLLM::Worker (0)", "a name may hold blanks and parentheses"
    assert found[201]["name"] == "VLLM::EngineCore_DP0"
    assert worker["cpu_seconds_total"] == 150 / TICKS
    assert worker["run_queue_wait_seconds_total"] == 2.0
    assert (worker["thread_count"], worker["resident_bytes"]) == (3, 2048 * 1024)
    assert (worker["voluntary_switches_total"], worker["involuntary_switches_total"]) == (11, 22)
    assert worker["process_started_at"] == datetime.fromtimestamp(1700000000 + 5000 / TICKS, UTC)


def test_a_container_whose_first_process_is_the_engine(kernel: Kernel) -> None:
    """pid 1 is no init there: it is the parent of the same job."""
    kernel.process(1, name="vllm", parent=0, group=1)
    kernel.process(7, name="EngineCore", parent=1, group=1)

    assert set(processes(collector(kernel).collect(NOW, watch_pids=[7]))) == {1, 7}


def test_an_engine_is_found_by_its_port(kernel: Kernel) -> None:
    """The socket's inode leads to the process that holds it, and from there to its children."""
    kernel.process(200, name="llama-server")
    kernel.open_file(200, 5, "socket:[4711]")
    kernel.process(210, name="worker", parent=200)
    kernel.process(300, name="nginx")
    kernel.open_file(300, 5, "socket:[4242]")
    kernel.listen({8000: 4711, 9000: 4712})
    found = processes(collector(kernel).collect(NOW, listen_ports=[8000]))

    assert {pid: row["role"] for pid, row in found.items()} == {200: "engine", 210: "relative"}


def test_a_process_that_ends_leaves_and_its_successor_comes(kernel: Kernel) -> None:
    """A restart is another process even under the same pid; it is searched for 10 s later at the earliest."""
    kernel.process(200, started=5000)
    here = collector(kernel)
    first = processes(here.collect(NOW, watch_pids=[200]))
    kernel.process_again(200, started=9000)
    gone = processes(here.collect(NOW + timedelta(seconds=5), watch_pids=[200]))
    second = processes(here.collect(NOW + timedelta(seconds=10), watch_pids=[200]))

    assert gone == {}
    assert first[200]["process_started_at"] != second[200]["process_started_at"]


def test_a_process_that_vanishes_while_it_is_read(kernel: Kernel) -> None:
    """Its stat was still there, the rest is gone: what was read is kept, nothing fails."""
    kernel.process(200)
    for name in ("status", "schedstat"):
        kernel.remove(f"200/{name}")
    frames = collector(kernel).collect(NOW, watch_pids=[200])
    row = processes(frames)[200]

    assert (row["cpu_seconds_total"], row["resident_bytes"], row["run_queue_wait_seconds_total"]) == (
        150 / TICKS,
        None,
        None,
    )
    assert outcome(frames)["status"] == "ok"


@pytest.mark.parametrize("stat", ["", "200 (half", "200 (python) S 1 2\n", "200 (python) S x x x\n"])
def test_a_stat_that_is_cut_off_is_no_process(kernel: Kernel, stat: str) -> None:
    """Nothing is made up from half a line."""
    kernel.process(200)
    kernel.process(201)
    kernel.write("200/stat", stat)

    assert set(processes(collector(kernel).collect(NOW, watch_pids=[200, 201]))) == {201}


def test_all_processes_are_looked_at_once_a_minute_only(kernel: Kernel) -> None:
    """A child that starts later is found with the next search, not in the next tick."""
    kernel.process(200)
    here = collector(kernel)
    here.collect(NOW, watch_pids=[200])
    kernel.process(201, parent=200)

    at = [NOW + timedelta(seconds=seconds) for seconds in (5, 55, 60)]
    assert [len(processes(here.collect(moment, watch_pids=[200]))) for moment in at] == [1, 1, 2]


def test_the_real_host_agrees_with_psutil() -> None:
    """Counters read just before and just after ours enclose ours."""
    here = HostCollector("here")
    before = (psutil.cpu_times(), psutil.net_io_counters(pernic=True), psutil.disk_io_counters(perdisk=True))
    frames = here.collect(datetime.now(UTC))
    after = (psutil.cpu_times(), psutil.net_io_counters(pernic=True), psutil.disk_io_counters(perdisk=True))
    row = sample(frames)

    assert outcome(frames)["detail"] is None
    assert row["cpu_count"] == psutil.cpu_count()
    assert row["booted_at"] == datetime.fromtimestamp(psutil.boot_time(), UTC)
    assert row["memory_total_bytes"] == psutil.virtual_memory().total
    assert row["swap_total_bytes"] == psutil.swap_memory().total
    # psutil's seconds are quotients of ticks: their sums are off by less than a tick's millionth.
    idle, user = float(str(row["cpu_idle_seconds_total"])), float(str(row["cpu_user_seconds_total"]))
    assert before[0].idle - 1e-6 <= idle <= after[0].idle + 1e-6
    assert before[0].user + before[0].nice - 1e-6 <= user <= after[0].user + after[0].nice + 1e-6
    for name, card in devices(frames, "network").items():
        assert before[1][name].bytes_recv <= float(str(card["read_bytes_total"])) <= after[1][name].bytes_recv
    for name, disk in devices(frames, "disk").items():
        assert before[2][name].write_bytes <= float(str(disk["write_bytes_total"])) <= after[2][name].write_bytes
    for mount, files in devices(frames, "filesystem").items():
        assert files["size_bytes"] == os.statvfs(mount).f_blocks * os.statvfs(mount).f_frsize


LISTENER = """
import socket, subprocess, sys
server = socket.create_server(("127.0.0.1", 0))
child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
print(server.getsockname()[1], child.pid, flush=True)
sys.stdin.read()
"""


def test_a_real_engine_is_found_read_and_missed() -> None:
    """A process that listens and its child are found by the port; killed, both are gone in the next tick."""
    engine = subprocess.Popen([sys.executable, "-c", LISTENER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert engine.stdout is not None
    port, child = map(int, engine.stdout.readline().split())
    here = HostCollector("here")
    try:
        found = processes(here.collect(NOW, listen_ports=[port]))
        expected = psutil.Process(engine.pid)

        assert {pid: row["role"] for pid, row in found.items() if row["role"] == "engine"} == {engine.pid: "engine"}
        assert found[child]["role"] == "relative"
        row = found[engine.pid]
        assert row["name"] == expected.name()
        assert row["thread_count"] == 1
        assert row["open_files"] == expected.num_fds()
        assert row["cpu_seconds_total"] == sum(expected.cpu_times()[:2])
        assert row["resident_bytes"] == expected.memory_info().rss
        assert abs((row["process_started_at"].timestamp()) - expected.create_time()) < 0.05  # type: ignore[attr-defined]
    finally:
        for pid in (child, engine.pid):
            os.kill(pid, 9)
        engine.wait()
    assert engine.pid not in processes(here.collect(NOW + timedelta(seconds=5), listen_ports=[port]))
