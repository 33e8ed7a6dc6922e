"""node_exporter pages become host rows; disks, cards and file systems are counted once each."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiinfra_pipelines.exposition import Reader
from optiinfra_pipelines.sql.sources import raw_tables
from optiinfra_pipelines.telemetry import node_exporter
from optiinfra_pipelines.telemetry.advice import missing_from_node_exporter
from optiinfra_pipelines.telemetry.devices import (
    Mount,
    counted_disks,
    counted_filesystems,
    is_counted_interface,
)
from optiinfra_pipelines.telemetry.node_exporter import Boot, HostPage, boot_identity
from optiinfra_pipelines.telemetry.samples import Row, Sample, Selection

NOW = datetime(2026, 11, 20, 15, 0, tzinfo=UTC)
RECORDED = Path(__file__).parent.parent / "fixtures" / "node_exporter"


def read(text: str) -> HostPage:
    page = Reader().read(text)
    wanted = Selection(node_exporter.FAMILIES.__contains__)
    return node_exporter.read_host(wanted.of(page), host="n1", sampled_at=NOW)


def recorded(number: int) -> HostPage:
    return read((RECORDED / f"real_debian12_ne1.5.0_scrape{number}.prom").read_text())


def upstream() -> HostPage:
    folder = os.environ.get("OPTIINFRA_DATA")
    if not folder:
        pytest.skip("OPTIINFRA_DATA names no folder of recordings")
    return read((Path(folder) / "fixtures" / "node_exporter" / "upstream_e2e-output.txt").read_text())


def devices(page: HostPage, kind: str) -> dict[object, Row]:
    return {row["device"]: row for row in page.device_rows if row["kind"] == kind}


def test_a_recorded_host_reads_as_its_page_says() -> None:
    """Two CPUs added up by mode, by hand from the page."""
    page = recorded(1)
    (row,) = page.host_rows

    assert row["cpu_count"] == 2
    assert row["cpu_user_seconds_total"] == pytest.approx(411.29 + 455.54)
    assert row["cpu_system_seconds_total"] == pytest.approx(91.03 + 86.7 + 0.52 + 4.13)
    assert row["cpu_idle_seconds_total"] == pytest.approx(748.84 + 706.41)
    assert row["cpu_iowait_seconds_total"] == pytest.approx(5.13 + 5.27)
    assert row["cpu_steal_seconds_total"] == pytest.approx(2.95 + 3.01)
    assert row["load_1m"] == 5.27
    assert row["memory_total_bytes"] == 25276502016
    assert row["memory_available_bytes"] == 21807800320
    assert row["psi_cpu_some_seconds_total"] == 262.2357
    assert row["psi_io_full_seconds_total"] == 5.827413
    assert row["major_faults_total"] == 2671
    assert row["swap_used_bytes"] == 0
    assert row["booted_at"] == datetime.fromtimestamp(1795185589, UTC)
    assert missing_from_node_exporter(page.families) == []


def test_a_recorded_host_has_one_disk_one_card_and_one_file_system() -> None:
    """The page also has zram0, lo and two ifb; none of them is a device that wears out or fills up."""
    page = recorded(1)

    disk = devices(page, "disk")
    assert list(disk) == ["vda"]
    assert disk["vda"]["read_bytes_total"] == 3996718080
    assert disk["vda"]["busy_seconds_total"] == pytest.approx(29.592)
    card = devices(page, "network")
    assert list(card) == ["eth0"]
    assert (card["eth0"]["read_bytes_total"], card["eth0"]["write_bytes_total"]) == (3600850959, 4921206)
    files = devices(page, "filesystem")
    assert list(files) == ["/"]
    assert (files["/"]["size_bytes"], files["/"]["available_bytes"]) == (270553174016, 68498288640)


def test_counters_of_one_boot_only_grow() -> None:
    """Ten seconds lie between the two recorded scrapes, on 2 CPUs; both name the same boot."""
    first, second = recorded(1).host_rows[0], recorded(2).host_rows[0]
    columns = [column for column in first if column.endswith("_total")]
    grown = {column: float(str(second[column])) - float(str(first[column])) for column in columns}

    assert first["boot_id"] == second["boot_id"]
    assert min(grown.values()) >= 0
    spent = sum(grown[column] for column in node_exporter.CPU_MODES)
    assert 15 < spent < 25, "CPU seconds of 2 CPUs in about 10 s"


def test_upstreams_page_of_every_collector_counts_whole_disks() -> None:
    """Upstream's test page: LVM volumes, partitions and a CD drive beside the disks they lie on."""
    page = upstream()
    (row,) = page.host_rows

    assert set(devices(page, "disk")) == {"mmcblk0", "nvme0n1", "sda", "sdb", "sdc", "vda"}
    assert row["cpu_count"] == 8
    assert row["cpu_iowait_seconds_total"] == pytest.approx(2.2 + 5.91 + 4.41 + 5.33 + 2.17 + 6.72 + 3.19 + 5.55)
    assert row["swap_in_bytes_total"] == 1476 * 4096
    assert row["memory_available_bytes"] is None, "that kernel has no MemAvailable"
    raw_tables()["raw_host_samples"].frame(page.host_rows)
    raw_tables()["raw_host_devices"].frame(page.device_rows)


def test_guest_time_is_counted_once() -> None:
    """`user` holds it already; node_cpu_guest_seconds_total tells it again."""
    text = """
node_cpu_seconds_total{cpu="0",mode="user"} 100
node_cpu_seconds_total{cpu="0",mode="nice"} 5
node_cpu_guest_seconds_total{cpu="0",mode="user"} 60
"""
    (row,) = read(text).host_rows

    assert row["cpu_user_seconds_total"] == 105
    assert row["cpu_steal_seconds_total"] is None, "a mode that is not told is not zero"
    assert row["booted_at"] is None


def test_a_page_of_another_exporter_is_no_host() -> None:
    """A wrong URL gives no row, not a row of nothing."""
    page = read("process_cpu_seconds_total 5\nup 1\n")

    assert (page.host_rows, page.device_rows, page.families) == ([], [], frozenset())


def test_a_mount_that_cannot_be_read_is_left_out() -> None:
    """node_exporter prints size 0 for it, with device_error set."""
    text = """
node_filesystem_size_bytes{device="nas:/models",fstype="nfs4",mountpoint="/models"} 0
node_filesystem_device_error{device="nas:/models",fstype="nfs4",mountpoint="/models"} 1
node_filesystem_size_bytes{device="/dev/sda1",fstype="ext4",mountpoint="/var/lib/kubelet/pods/x/volume"} 10
node_filesystem_size_bytes{device="/dev/sda1",fstype="ext4",mountpoint="/data"} 10
node_filesystem_device_error{device="/dev/sda1",fstype="ext4",mountpoint="/data"} 0
node_filesystem_size_bytes{device="tmpfs",fstype="tmpfs",mountpoint="/run"} 10
"""
    assert list(devices(read(text), "filesystem")) == ["/data"]


def test_a_boot_time_that_drifts_is_the_same_boot() -> None:
    """The kernel derives it from the wall clock, so it moves by a second or so; a reboot moves it by more."""
    first = boot_identity(1000.0, None)
    assert first is not None

    assert boot_identity(1001.0, first) == first
    assert boot_identity(999.0, first) == first
    later = boot_identity(1100.0, first)
    assert later is not None
    assert later.boot_id != first.boot_id
    assert boot_identity(None, first) is None
    assert boot_identity(0.0, None) is None


@given(st.floats(min_value=1, max_value=4e9), st.floats(min_value=-29, max_value=29))
def test_boots_within_the_tolerance_keep_their_name(seconds: float, drift: float) -> None:
    """Whatever the boot time, thirty seconds of drift never split a boot in two."""
    boot = Boot("b", datetime.fromtimestamp(seconds, UTC))
    moved = boot.booted_at + timedelta(seconds=drift)

    if moved.timestamp() > 0:
        assert boot_identity(moved.timestamp(), boot) == boot


@pytest.mark.parametrize(
    ("names", "counted"),
    [
        (["sda", "sda1", "sda2", "sdb"], {"sda", "sdb"}),
        (["nvme0n1", "nvme0n1p1", "nvme0n1p2", "nvme1n1"], {"nvme0n1", "nvme1n1"}),
        (["nvme0n1", "nvme0c0n1", "nvme0c1n1"], {"nvme0n1"}),
        (["mmcblk0", "mmcblk0p1"], {"mmcblk0"}),
        (["xvda1", "xvdb"], {"xvda1", "xvdb"}),
        (["vda", "vda1", "dm-0", "md127", "loop0", "ram0", "zram0", "sr0"], {"vda"}),
        ([], set()),
    ],
)
def test_each_disk_counts_once(names: list[str], counted: set[str]) -> None:
    """Partitions, stacked devices and paths repeat the IO of a disk; xvda1 without xvda is a disk."""
    assert counted_disks(names) == counted


def test_cards_by_name() -> None:
    """Names of hardware, and of what container runtimes and tunnels make."""
    cards = ["eth0", "ens5", "enp3s0f0", "ib0", "wlan0", "eno1np0"]
    plumbing = [
        "lo",
        "docker0",
        "veth12ab",
        "br-9f",
        "cni0",
        "cali123",
        "flannel.1",
        "bond0",
        "eth0.100",
        "wg0",
        "ifb0",
    ]

    assert [name for name in cards + plumbing if is_counted_interface(name)] == cards


def test_file_systems_are_counted_by_device() -> None:
    """The shortest whole mount stands for a device; a network share is asked only by its own host's exporter."""
    mounts = [
        Mount("/dev/sda1", "/var/lib/containers/x", "xfs", "/x"),
        Mount("/dev/sda1", "/mnt/models", "xfs"),
        Mount("/dev/sda1", "/mnt/models/again", "xfs"),
        Mount("/dev/sdb1", "/etc/hosts", "ext4", "/docker/hosts"),
        Mount("overlay", "/", "overlay"),
        Mount("overlay", "/var/lib/docker/overlay2/1/merged", "overlay"),
        Mount("tmpfs", "/tmp", "tmpfs"),
        Mount("nas:/share", "/share", "nfs4"),
        Mount("/dev/loop3", "/snap/core", "squashfs"),
    ]

    assert [mount.mount_point for mount in counted_filesystems(mounts, is_local=True)] == ["/", "/mnt/models"]
    assert [mount.mount_point for mount in counted_filesystems(mounts, is_local=False)] == [
        "/",
        "/mnt/models",
        "/share",
    ]


@given(st.lists(st.tuples(st.sampled_from(sorted(node_exporter.FAMILIES)), st.floats()), max_size=30))
def test_any_values_make_rows_that_the_tables_take(samples: list[tuple[str, float]]) -> None:
    """Whatever numbers a page brings, rows fit the schema and no infinity gets in."""
    labels = {"device": "sda", "mountpoint": "/", "fstype": "ext4", "mode": "user", "cpu": "0"}
    made = [Sample(name, labels, value) for name, value in samples if not 1e11 < value < 1e309]
    page = node_exporter.read_host(made, host="n1", sampled_at=NOW)

    frame = raw_tables()["raw_host_samples"].frame(page.host_rows)
    assert frame.select("load_1m", "cpu_user_seconds_total").fill_null(0).to_series().is_finite().all()
    raw_tables()["raw_host_devices"].frame(page.device_rows)
