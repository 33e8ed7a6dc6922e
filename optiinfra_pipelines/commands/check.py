"""`optiinfra check`: the doctor's word on fleet.yaml, every target and every host, and lines to paste."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import UTC, datetime

import click

from optiinfra_pipelines.analysis.burn_rate import never_firing
from optiinfra_pipelines.analysis.objectives import objectives_of
from optiinfra_pipelines.analysis.recommendations.flags import unread_flags
from optiinfra_pipelines.commands.console import console
from optiinfra_pipelines.settings import Paths, SettingsError, load_fleet
from optiinfra_pipelines.settings_rollouts import rollout_warnings
from resources.doctor import Doctor, HostDiagnosis, TargetDiagnosis, lines_to_paste
from resources.rollouts.slots import IdleSlots


def run(paths: Paths, environ: Mapping[str, str]) -> None:
    """Print what was found; exit status 1 when something fleet.yaml names cannot be read."""
    try:
        fleet = load_fleet(paths.fleet_file, environ)
    except SettingsError as error:
        raise click.ClickException(str(error)) from error
    console.print(
        f"{paths.fleet_file}: valid; {len(fleet.targets)} targets, {len(fleet.deployments)} deployments, "
        f"{len(fleet.hosts)} hosts"
    )
    for warning in rollout_warnings(fleet, environ):
        console.print(f"! rollouts: {warning}")
    for deployment in fleet.deployments:
        unread = unread_flags(deployment.engine, deployment.flags) if deployment.engine else []
        if unread:
            console.print(
                f"! flags of {deployment.name}: no advice for {deployment.engine} reads {', '.join(unread)}; check the "
                "spelling, or leave them out"
            )
        for objective in objectives_of(deployment)[0]:
            for warning in never_firing(objective):
                console.print(f"! objectives of {deployment.name}: {warning}")
    doctor = Doctor(fleet, IdleSlots(fleet, paths.rollouts_dir)())
    now = datetime.now(UTC)
    try:
        targets, hosts, found = doctor.targets(now), doctor.hosts(now), doctor.found(now)
    finally:
        doctor.close()
    for target in targets:
        _print_target(target)
    for host in hosts:
        _print_host(host)
    if found:
        console.print("\nengines on this machine that fleet.yaml does not name yet:")
        for engine in found:
            _print_target(engine)
        console.print("add under `targets:`")
        for line in lines_to_paste(found):
            console.print(line)
    elif not targets:
        console.print("\nno target, and no engine answers on the usual loopback ports; name one under `targets:`")
    if any(target.fault and not target.is_idle_slot for target in targets) or not all(host.is_well for host in hosts):
        sys.exit(1)


def _print_target(diagnosis: TargetDiagnosis) -> None:
    name, told = diagnosis.target.name, diagnosis.description
    source = "" if diagnosis.target.source == "live" else f" ({diagnosis.target.source})"
    if diagnosis.is_idle_slot:
        console.print(f"· {name}{source}  {diagnosis.target.url}\n    idle slot: a place for candidates of rollouts")
        return
    if told is None:
        console.print(f"✗ {name}{source}  {diagnosis.target.url}\n    {diagnosis.fault}")
        return
    version = diagnosis.version or told.generation or "version unknown"
    models = f", model {', '.join(told.models)}" if told.models else ""
    mark = "!" if told.missing_required or told.unknown else "✓"
    console.print(f"{mark} {name}{source}  {' + '.join(told.dialects)} {version}, {told.vantage}{models}")
    console.print(f"    {told.understood} families understood, {len(told.ranks)} engine rank(s)")
    for missing in told.missing_required:
        console.print(f"    missing: {', '.join(missing.families)}{_turn_on(missing.flag)}")
    for missing in told.missing_optional:
        console.print(f"    would add: {', '.join(missing.families)}{_turn_on(missing.flag)}")
    if told.unknown:
        console.print(f"    unknown: {', '.join(told.unknown)}")
    for note in (*told.notes, *told.dropped_histograms):
        console.print(f"    note: {note}")


def _turn_on(flag: str | None) -> str:
    return f"; turn on with {flag}" if flag else ""


def _print_host(host: HostDiagnosis) -> None:
    console.print(f"{'✓' if host.is_well else '✗'} host {host.host}")
    for fact in host.facts:
        console.print(f"    {fact}")
    for missing in host.missing:
        console.print(f"    missing: {missing}")
