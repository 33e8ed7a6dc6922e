"""The replay serves what was recorded, when it was recorded."""

from pathlib import Path

import httpx
import pytest

from resources.demo.replay import UNTIMED_STEP_SECONDS, ReplayServer, load_recording


def write(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / f"{name}.prom").write_text(f"# page {name}\n")
    return folder


def test_pages_keep_their_order_and_pace_across_phases(tmp_path: Path) -> None:
    """Phases are one process: offsets run on from the first page of the first phase."""
    later = write(tmp_path / "02_load", "1795187162438")
    first = write(tmp_path / "01_idle", "1795187151413", "1795187153436_note")

    recording = load_recording("vllm", [later, first])

    assert [(page.offset_seconds, page.phase) for page in recording.pages] == [
        (0.0, "01_idle"),
        (2.023, "01_idle"),
        (11.025, "02_load"),
    ]
    assert recording.page_at(-1) is recording.page_at(2.0) is recording.pages[0]
    assert recording.page_at(11.024) is recording.pages[1]
    assert recording.page_at(1e9) is recording.pages[2]


def test_snapshots_without_a_time_say_so(tmp_path: Path) -> None:
    """Their pace was not recorded: they are stepped, and marked."""
    recording = load_recording("sglang", [write(tmp_path / "a", "01_idle", "02_light")])

    assert not recording.is_timed
    assert [page.offset_seconds for page in recording.pages] == [0.0, UNTIMED_STEP_SECONDS]


def test_an_empty_or_mixed_folder_is_an_error_that_names_the_recording(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="'gone'"):
        load_recording("gone", [tmp_path])
    with pytest.raises(ValueError, match="'mixed'"):
        load_recording("mixed", [write(tmp_path / "m", "1795187151413", "01_idle")])


def test_the_page_is_the_recorded_bytes_over_http(tmp_path: Path) -> None:
    """A client reads byte for byte what the engine said at that moment, and 404 for a name nobody recorded."""
    recording = load_recording("vllm", [write(tmp_path / "p", "1795187151413", "1795187153413")])
    elapsed = [0.0]

    with ReplayServer([recording], lambda: elapsed[0]) as server, httpx.Client(trust_env=False) as client:
        first = client.get(server.url("vllm"))
        elapsed[0] = 2.0
        second = client.get(server.url("vllm"))
        missing = client.get(server.url("other"))

    assert first.content == b"# page 1795187151413\n"
    assert second.content == b"# page 1795187153413\n"
    assert missing.status_code == 404
