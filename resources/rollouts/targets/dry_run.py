"""The default target: writes down what it would do and changes nothing; its traffic is SIMULATED.

A rehearsal goes through every stage and every check of a real rollout, with the real judge on simulated counts, so
that a plan, its approvals and its timing can be tried before anything is at stake. The journal says for each action
what a real target would have done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optiinfra_pipelines.domain.rollout_policy import DryRunSettings
from resources.rollouts.targets.base import Actual, Flags, TokenFile


class DryRunTarget:
    """Keeps the share it was told and a journal, one JSON line per action, under `folder`."""

    kind = "dry_run"
    is_simulated = True
    drain_seconds = 0.0

    def __init__(self, deployment: str, settings: DryRunSettings, folder: Path) -> None:
        self._settings = settings
        self._state = TokenFile(Path(folder) / f"{deployment}.dry_run.json")
        self.journal = Path(folder) / f"{deployment}.dry_run.jsonl"

    def observe(self) -> Actual:
        """What the actions so far would have led to."""
        state = self._state.read()
        candidates = int(state.get("candidates", 0))
        return Actual(
            float(state.get("percent", 0.0)), candidates, self._settings.stable_replicas, 0, {"simulated": True}
        )

    def stable_replicas(self) -> int:
        return self._settings.stable_replicas

    def candidate_slots(self) -> int:
        return self._settings.stable_replicas

    def claim(self, rollout_id: str, token: int) -> None:
        self._do(token, {"rollout_id": rollout_id}, f"take the target with token {token}")

    def start_candidates(self, count: int, flags: Flags, token: int) -> None:
        given = [f"--{flag}={value}" if value else f"--{flag}" for flag, value in flags.items() if value is not None]
        left_out = [f"without --{flag}" for flag, value in flags.items() if value is None]
        line = " ".join([*given, *left_out])
        self._do(token, {"candidates": count}, f"have {count} candidate replicas run with {line}")

    def set_share(self, percent: float, token: int) -> None:
        self._do(token, {"percent": percent}, f"give the candidate {percent:g} % of new requests")

    def drain(self, token: int) -> bool:
        self._do(token, {}, "keep new requests off the candidate and wait for those in flight")
        return True

    def stop_candidates(self, token: int) -> None:
        self._do(token, {"candidates": 0}, "stop the candidate replicas")

    def promote(self, rollout_id: str, token: int) -> bool:
        self._do(
            token,
            {"percent": 0.0, "candidates": 0, "promoted": rollout_id},
            "make the candidates the stable replicas, stop the old ones",
        )
        return True

    def _do(self, token: int, change: Mapping[str, Any], would: str) -> None:
        with self._state.held(token) as state:
            state.update(change)
            with self.journal.open("a", encoding="utf-8") as journal:
                journal.write(json.dumps({"token": token, "would": would}) + "\n")
