"""An empty place for candidates is no outage; a candidate that should run and is gone is one. Real servers, gateway."""

import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from optiinfra_pipelines.analysis.findings.diagnosis import diagnose
from optiinfra_pipelines.analysis.findings.window import EngineWindow
from optiinfra_pipelines.analysis.watch import watch
from optiinfra_pipelines.domain.alerts import Alert
from optiinfra_pipelines.domain.findings import FindingKind
from optiinfra_pipelines.domain.fleet import Fleet, Target
from optiinfra_pipelines.domain.rollout_policy import DeploymentRollouts, RolloutPolicy
from optiinfra_pipelines.domain.thresholds import threshold_values
from resources.rollouts.slots import IdleSlots
from resources.rollouts.targets.build import haproxy_folder
from resources.rollouts.targets.haproxy import HaproxyTarget
from resources.scrape.breaker import Policy
from resources.scrape.engine_scraper import EngineScraper
from resources.scrape.metrics_endpoint import MetricsEndpoints
from resources.scrape.recent import RecentScrapes
from tests.rollout.conftest import NOW
from tests.rollouts.haproxy_kit import Gateway, process_at

VALUES = threshold_values({})


@dataclass
class Watched:
    """A fleet with two stable servers and one place for a candidate, scraped every 5 s of a clock of its own."""

    gateway: Gateway
    root: Path
    at: datetime = NOW
    alerts: dict[str, Alert] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rollouts = DeploymentRollouts(deployment="chat", haproxy=self.gateway.settings)
        servers = (*self.gateway.settings.stable, *self.gateway.settings.candidates)
        targets = tuple(Target(name=f"t-{one.server}", url=one.metrics) for one in servers)
        fleet = Fleet(targets=targets, rollouts=RolloutPolicy(deployments=(rollouts,)))
        self.slots = IdleSlots(fleet, self.root)
        self.endpoints = MetricsEndpoints(policy=Policy(failures_to_open=10**6))
        self.scraper = EngineScraper(fleet, self.endpoints, idle_slots=self.slots)
        self.recent = RecentScrapes(fleet)
        folder = haproxy_folder(self.root, "chat")
        self.target = HaproxyTarget(self.gateway.settings, folder, self.gateway.launcher)

    def look(self, ticks: int = 1) -> dict[str, str | None]:
        """So many ticks; the state of each target at the last, and the live watch's alerts kept."""
        for _ in range(ticks):
            self.at += timedelta(seconds=5)
            self.frames = self.scraper.collect(self.at)
            self.recent.remember(self.frames)
            fired, resolved = watch(self.recent.watched(), self.alerts, VALUES)
            self.alerts |= {one.key: one for one in fired}
            for one in resolved:
                del self.alerts[one.key]
        return {row["target"]: row["error_kind"] for row in self.frames["raw_scrapes"].iter_rows(named=True)}

    def findings(self, target: str) -> list[str]:
        """Causes of what the next refresh would find of a target."""
        end = self.at + timedelta(seconds=1)
        frames = [self.frames[name].filter(target=target) for name in ("raw_scrapes", "raw_engine_samples")]
        window = EngineWindow(
            target,
            end - timedelta(minutes=5),
            end,
            "live",
            *frames,
            self.frames["raw_engine_histograms"].clear(),
        )
        found = diagnose(window, VALUES)
        assert FindingKind.STALE_OR_MISSING_DATA in found.judged
        return [one.cause for one in found.findings]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Watched]:
    gateway = Gateway(tmp_path, stable=2, candidates=1, kind="builtin")
    made = Watched(gateway, tmp_path / "rollouts")
    yield made
    made.endpoints.close()
    gateway.close()


def started(fleet: Watched, rollout: str, token: int) -> None:
    fleet.target.claim(rollout, token)
    fleet.target.start_candidates(1, {}, token)
    [server] = fleet.target.started_servers()
    until = time.monotonic() + 20
    while True:
        try:
            urllib.request.urlopen(server.metrics, timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.05)


def test_a_slot_without_a_rollout_is_idle_and_raises_nothing(fleet: Watched) -> None:
    assert fleet.look(4) == {"t-s0": None, "t-s1": None, "t-c0": "idle_slot"}
    assert fleet.alerts == {}
    assert fleet.findings("t-c0") == []


def test_a_stable_server_that_is_down_is_no_idle_slot(fleet: Watched) -> None:
    process = process_at(fleet.gateway.settings.stable[0])
    assert process is not None
    process.kill()
    process.wait(5)

    assert fleet.look(3)["t-s0"] == "connect_refused"
    assert set(fleet.alerts) == {"TARGET_DOWN:t-s0"}
    assert fleet.findings("t-s0") == ["target_down"]


def test_a_candidate_that_should_run_and_is_gone_is_down_until_it_is_taken_back(fleet: Watched) -> None:
    started(fleet, "r-1", 1)
    fleet.target.set_share(25.0, 1)
    assert fleet.look(2)["t-c0"] is None
    process = process_at(fleet.gateway.settings.candidates[0])
    assert process is not None
    process.kill()
    process.wait(5)

    assert fleet.look(3)["t-c0"] == "connect_refused"
    assert set(fleet.alerts) == {"TARGET_DOWN:t-c0"}
    assert fleet.findings("t-c0") == ["target_down"]
    fleet.target.stop_candidates(1)
    assert fleet.look(3)["t-c0"] == "idle_slot"
    assert fleet.alerts == {}
    assert fleet.findings("t-c0") == []


def test_a_candidate_that_is_being_started_is_no_outage(fleet: Watched) -> None:
    """Before its first share it may take minutes, or fail: its rollout waits for it and says so. A second rollout is
    judged by its own share, not by the one before."""
    started(fleet, "r-1", 1)
    fleet.target.set_share(25.0, 1)
    fleet.target.set_share(0.0, 1)
    fleet.target.stop_candidates(1)
    fleet.target.claim("r-2", 2)
    started(fleet, "r-2", 2)
    process = process_at(fleet.gateway.settings.candidates[0])
    assert process is not None
    process.kill()
    process.wait(5)

    assert fleet.look(4)["t-c0"] == "idle_slot"
    assert fleet.alerts == {}


def test_after_a_completed_rollout_the_old_servers_are_the_idle_slots(fleet: Watched) -> None:
    started(fleet, "r-1", 1)
    fleet.target.set_share(100.0, 1)
    until = time.monotonic() + 10
    while not fleet.target.promote("r-1", 1):
        assert time.monotonic() < until

    assert fleet.look(3) == {"t-s0": "idle_slot", "t-s1": "idle_slot", "t-c0": None}
    assert fleet.alerts == {}
    fleet.target.claim("r-2", 2)
    fleet.target.start_candidates(1, {}, 2)
    assert fleet.slots() == {"t-s0", "t-s1"}
    fleet.target.set_share(25.0, 2)
    assert fleet.slots() == {"t-s1"}


def test_what_is_not_known_is_a_failure_and_not_idle(fleet: Watched) -> None:
    """A state file that cannot be read hides no outage."""
    fleet.target.claim("r-1", 1)
    [file] = (fleet.root / "haproxy" / "chat").glob("*.json")
    file.write_text("{")

    assert fleet.look(1)["t-c0"] == "connect_refused"
