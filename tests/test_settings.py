"""fleet.yaml: what is right is read, and whatever is wrong is named with its line, key and remedy, all at once."""

from __future__ import annotations

import re
import traceback
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiinfra_pipelines.domain.fleet import Fleet
from optiinfra_pipelines.domain.thresholds import THRESHOLDS, threshold_values
from optiinfra_pipelines.settings import SettingsError, find_paths, load_fleet, parse_fleet
from optiinfra_pipelines.settings_rollouts import rollout_warnings
from optiinfra_pipelines.settings_yaml import Problem

REPOSITORY = Path(__file__).resolve().parent.parent
CHAT = "deployments: [{name: chat, model: m}]\n"
HAPROXY = (
    "rollouts:\n  deployments:\n  - deployment: chat\n    haproxy:\n      socket: /run/ha\n      backend: chat\n"
    "      state_file: /tmp/state\n      stable: [{server: s, url: 'http://h:1'}]\n"
    "      candidates: [{server: c, url: 'http://h:2'}]\n"
)
LOCAL = HAPROXY.replace("h:2", "127.0.0.1:2")
WINDOW = "rollouts: {freeze_windows: [{name: w, days: [fri], since: '16:00', until: '06:00', time_zone: UTC}]}"
TARGET = "targets:\n  - name: a\n    url: http://h:1/metrics\n"


def fault_of(text: str, **environ: str) -> str:
    """The one line that names the one fault of `text`."""
    with pytest.raises(SettingsError) as caught:
        parse_fleet(text, environ)
    assert len(caught.value.problems) == 1, str(caught.value)
    return str(caught.value).splitlines()[1].strip()


def problems_of(text: str) -> tuple[Problem, ...]:
    """What is wrong with `text`; nothing when it is a fleet. Any other exception is the test's failure."""
    try:
        parse_fleet(text, {})
    except SettingsError as error:
        return error.problems
    return ()


def test_the_shipped_file_watches_this_host_and_needs_no_edit() -> None:
    """No targets, no environment, one local host, and every default of the nouns."""
    fleet = load_fleet(REPOSITORY / "fleet.yaml", {})

    assert fleet == Fleet(hosts=fleet.hosts)
    assert [host.local for host in fleet.hosts] == [True]


def test_every_commented_example_of_the_shipped_file_is_valid() -> None:
    """An operator takes the # away; what appears must load."""
    text = (REPOSITORY / "fleet.yaml").read_text()
    _, _, body = text.partition("\nhosts:")
    uncommented = "hosts:" + re.sub(r"^( *)# (?! *Any )", r"\1", body, flags=re.MULTILINE).replace("# Any", "#")

    fleet = parse_fleet(uncommented, {"CHAT_METRICS_TOKEN": "s3cret"})

    assert [target.name for target in fleet.targets] == ["chat-0"]
    assert len(fleet.deployments[0].objectives) == 2
    assert fleet.hosts[1].node_exporter == "http://10.0.0.5:9100/metrics"
    assert fleet.thresholds == {"stale_after_seconds": 30.0}
    assert fleet.rollouts.freeze_windows[0].holds(datetime(2026, 11, 28, 12, tzinfo=UTC))
    haproxy = fleet.rollouts.of("chat").haproxy
    assert haproxy is not None
    assert haproxy.candidates[0].metrics == "http://127.0.0.1:8100/metrics"
    assert fleet.targets[0].headers["Authorization"].get_secret_value() == "Bearer s3cret"


FAULTS = {
    # YAML itself
    "": "1:1: the file is empty; to watch this host",
    "# only a comment\n": "1:1: the file is empty",
    "null": "1:1: the file is empty",
    "- a\n": "1:1: wants `key: value` lines at the top",
    "just words": "1:1: wants `key: value` lines at the top",
    "hosts:\n\t- {name: a, local: true}": "2:1: not YAML: found character '\\t'",
    "targets: [": "not YAML",
    "a: b: c": "1:5: not YAML: mapping values are not allowed here; quote a value",
    "keep: []\n---\nkeep: []\n": "2:1: not YAML: but found another document",
    "keep: [\x07]": "not YAML: unacceptable character",
    "keep: !!python/object/apply:os.system [x]": "1:1: keep: has the tag",
    "&a {keep: *a}": "1:5: keep: an alias that holds itself",
    "keep: [a]\nkeep: [b]\n": "2:1: keep: is written twice, first on line 1; keep one",
    # Keys
    "target: []": "1:1: target: unknown key; did you mean 'targets'?",
    "zzz: 1": "1:1: zzz: unknown key; known: alerts, cadence, deployments, hosts,",
    "cadance:": "1:1: cadance: unknown key; did you mean 'cadence'?",
    "cadence: {colect_seconds: }": "1:11: cadence.colect_seconds: unknown key; did you mean 'collect_seconds'?",
    "thresholds: {stale_after: }": "1:14: thresholds.stale_after: unknown threshold; did you mean 'stale_aft",
    "keep: " + "[" * 5_000: "1:1: nests lists or mappings hundreds deep",
    "cadence:\n  colect_seconds: 5": "2:3: cadence.colect_seconds: unknown key; did you mean 'collect_seconds'?",
    "targets: [{name: a}]": "1:11: targets[0]: has no 'url'; add it: Full URL of the metrics page",
    "targets: {a: http://x/metrics}": "1:1: targets: wants a list: one '- ' line for each entry",
    "targets: [http://x/metrics]": "1:11: targets[0]: wants `key: value` lines below it; got 'http://x/metrics'",
    "retention: 48": "1:1: retention: wants `key: value` lines below it; got '48'",
    "hosts: [{name: [a], local: true}]": "hosts[0].name: wants one word or number, not a list",
    # Units
    "cadence: {collect_seconds: 5s}": "whole number of seconds, written without a unit, such as 5; got '5s'",
    "cadence: {collect_seconds: 0:05}": "a whole number of seconds",
    "cadence: {collect_seconds: 4}": "cadence.collect_seconds: must be at least 5 seconds; got '4'",
    "cadence: {scrape_deadline_seconds: 5}": "1:11: cadence.scrape_deadline_seconds: a scrape may take 5 s and the "
    "next begins after 5 s; choose a scrape_deadline_seconds below collect_seconds",
    "cadence: {scrape_deadline_seconds: .inf}": "scrape_deadline_seconds: wants a number of seconds",
    "retention: {raw_hours: 2 days}": "retention.raw_hours: wants a whole number of hours, written without a unit",
    'deployments: [{name: a, model: m, price_usd_per_gpu_hour: "$2"}]': "price_usd_per_gpu_hour: wants a number of US "
    "dollars per GPU and hour, written without a unit, such as 2.5; got '$2'",
    "deployments: [{name: a, model: m, gpus_per_replica: true}]": "wants a whole number of GPUs",
    "deployments: [{name: a, model: m, objectives: [{kind: availability, target_ratio: 99%}]}]": "(99 % is 0.99)",
    "deployments: [{name: a, model: m, objectives: [{kind: availability, target_ratio: 99}]}]": "must be less than 1",
    "deployments: [{name: a, model: m, flags: {--max-num-seqs: 256}}]": "without its dashes: max-num-seqs",
    # Names and references
    "targets: [{name: a b, url: http://x/m}]": "targets[0].name: wants letters, digits",
    "targets: [{name: a, url: x:8000/metrics}]": "wants a full URL, such as http://10.0.0.5:8000/metrics; got 'x:8000",
    "targets: [{name: a, url: http://x/m, engine: vlm}]": "is not a known engine; got 'vlm'; did you mean 'vllm'?",
    TARGET + "    deployment: chat\n": "4:5: targets[0].deployment: 'chat' is not among the dep",
    TARGET + "    host: nod1\nhosts: [{name: node1, local: on}]": "is not among the hosts; did you mean 'node1'?",
    TARGET + "  - name: a\n    url: http://h:2/metrics\n": "4:5: targets[1].name: 'a' is also the name on line 2;",
    "hosts: [{name: a}]": "hosts[0]: has nothing to read; add `local: true`",
    "hosts: [{name: a, local: true}, {name: b, local: yes}]": "hosts[1].local: the host on line 1 is this machine",
    "hosts: [{name: a, local: maybe}]": "hosts[0].local: wants true or false; got 'maybe'",
    "deployments: [{name: a, model: m, min_replicas: 3, max_replicas: 2}]": "max_replicas: is 2, below min_replicas 3",
    "deployments: [{name: a, model: m, objectives: [{kind: ttft, target_ratio: 0.9}]}]": "needs threshold_seconds",
    "deployments: [{name: a, model: m, objectives: [{kind: availability, target_ratio: 0.9, threshold_seconds: 1}]}]": (
        "threshold_seconds: means nothing for availability"
    ),
    "deployments: [{name: a, model: m, shape: {layers: 32}}]": "shape: gqa attention needs",
    "deployments: [{name: a, model: m, shape: {layers: 3, kv_head: 1}}]": "shape.kv_head: unknown key; did you mean",
    "thresholds: {stale_after: 5}": "1:14: thresholds.stale_after: unknown threshold; did you mean 'stale_aft",
    "thresholds: {stale_after_seconds: 1}": "in s, without the unit, from 10 to 3600 (default 30); got '1'",
    "thresholds: {stale_after_seconds: 30s}": "got '30s'",
    # Rollouts
    CHAT + "rollouts: {deployments: [{deployment: chta}]}": "2:27: rollouts.deployments[0].deployment: 'chta' is not "
    "among the deployments; did you mean 'chat'?",
    CHAT + "rollouts: {deployments: [{deployment: chat}, {deployment: chat}]}": "'chat' stands on line 2 already",
    CHAT + "rollouts: {deployments: [{deployment: chat, haproxi: {}}]}": "unknown key; did you mean 'haproxy'?",
    CHAT + HAPROXY.replace("/run/ha", "run/ha"): "haproxy.socket: is 'run/ha', a relative path; runs start elsewhere",
    CHAT + HAPROXY.replace("server: c", "server: s"): "a server stands twice in stable and candidates: ['s', 's']",
    CHAT + HAPROXY.replace("http://h:1", "http://u:hunter2@h:1"): "stable[0].url: holds credentials",
    CHAT + LOCAL + "      launch: [vllm]\n": "launch: has no '{flags}', so no change would reach the engine",
    CHAT + HAPROXY + "      launch: [vllm, '{flags}']\n": "candidates[0].url: is on h, and launch starts processes of",
    "rollouts: {approvers: [alice, Alice]}": "rollouts.approvers[1]: 'Alice' and 'alice' mean one person; keep one",
    "rollouts: {approvers: [OptiInfra]}": "executes rollouts and may not approve them; name a person",
    "rollouts: {lease_seconds: 10}": "a lease of 10 s with a look every 5 s is lost to one slow look; make lease_sec",
    "rollouts: {approval_hours: 1 day}": "rollouts.approval_hours: wants a number of hours, written without a unit",
    "rollouts: {blast_radius: {max_first_percent: 200}}": "max_first_percent: must be at most 100 percent; got '200'",
    WINDOW.replace("UTC", "Europe/Berln"): "'Europe/Berln' is no IANA time zone; write one such as Europe/Berlin",
    WINDOW.replace("06:00", "6"): "freeze_windows[0].until: wants a time of day as HH:MM, such as 22:00; got '6'",
    WINDOW.replace("fri", "friday"): "is not a known days; got 'friday'; did you mean 'fri'?",
    # URLs and secrets
    "targets: [{name: a, url: 'http://u:hunter2@x/m'}]": "targets[0].url: holds credentials; take them out",
    "targets: [{name: a, url: 'http://x/m?api_key=hunter2'}]": "url: holds a secret in its query",
    "targets: [{name: a, url: 'http://x:99999/m'}]": "is not a URL",
    "targets: [{name: a, url: 'http:///m'}]": "names no host",
    "targets: [{name: a, url: 'http://x/m#here'}]": "has a part after '#'",
    "hosts: [{name: a, node_exporter: 'http://u:hunter2@x/m'}]": "hosts[0].node_exporter: holds credentials",
    TARGET + "    headers: {Authorization: Bearer hunter2}": "4:15: targets[0].headers.Authorization: looks like a",
    TARGET + "    headers: {X-Api-Key: hunter2}": "looks like a secret in plain sight",
    TARGET + "    headers: {X-Thing: hunter2hunter2hunter2hunter2}": "looks like a secret in plain sight",
    TARGET + "    headers: {X-Thing: Bearer hunter2}": "looks like a secret in plain sight",
    TARGET + "    headers: Bearer hunter2": "headers: wants `key: value` lines below it",
    TARGET + "    headers: {Connection: close}": "is set by the collector itself",
    TARGET + "    headers: {'a b': c}": "is not a header's name",
    TARGET + "    headers: {a: b, A: b}": "is given twice",
    TARGET + '    headers: {a: "b\\nc"}': "wants one line of ASCII",
    TARGET + "    headers: {a: '${NOT_SET}'}": "names ${NOT_SET}, and the environment has no NOT_SET; export it",
    TARGET + "    headers: {a: '${BLANK}'}": "names ${BLANK}, and BLANK is set but empty",
    TARGET + "    headers: {a: '${LINES}'}": "names ${LINES}, whose value has a line break",
    TARGET + "    headers: {a: '${A:-b}'}": "holds a ${ that is no ${NAME}",
    "targets: [{name: a, url: '${NOT_SET}'}]": "targets[0].url: names ${NOT_SET}",
    "prometheus: {url: 'http://u:hunter2@x:9090'}": "prometheus.url: holds credentials; take them out",
    "prometheus: {url: 'http://x:9090?token=hunter2'}": "prometheus.url: holds a secret in its query",
    "prometheus: {url: 'http://x', headers: {Authorization: Bearer hunter2}}": "prometheus.headers.Authorization: look",
    "prometheus: {url: 'http://x', headers: {'a b': c}}": "prometheus.headers.a b: is not a header's name",
    "alerts: {webhook: 'https://hooks.example/hunter2'}": "alerts.webhook: is a secret in plain sight",
    "alerts: {webhook: '${LINES}'}": "alerts.webhook: names ${LINES}",
    # Series of a Prometheus server
    "hosts: [{name: a, gpu_series: {label: Hostname, value: b}}]": "hosts[0].gpu_series: is asked of a Prometheus serv",
}


@pytest.mark.parametrize("text", FAULTS)
def test_a_fault_is_named_with_its_place_and_remedy(text: str) -> None:
    """One fault, one line; the line never repeats a credential."""
    said = fault_of(text, BLANK=" ", LINES="hunter2\n")

    assert said.startswith("fleet.yaml:")
    assert FAULTS[text] in said
    assert "hunter2" not in said


def test_a_host_may_be_known_by_its_series_alone() -> None:
    """The Prometheus server that a fleet already has is a source of its own."""
    fleet = parse_fleet(
        "prometheus: {url: 'http://server:9090'}\nhosts: [{name: a, node_series: {label: instance, value: b:9100}}]", {}
    )

    assert fleet.hosts[0].node_series is not None


def test_all_faults_come_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    """An operator mends the file once, not once per fault."""
    path = tmp_path / "my-fleet.yaml"
    path.write_text("targtes: []\ncadence: {collect_seconds: 5s}\nretention: {raw_hours: 1}\nhosts: [{name: a}]\n")

    with pytest.raises(SettingsError) as caught:
        load_fleet(path, {})

    assert [problem.line for problem in caught.value.problems] == [1, 2, 3, 4]
    assert [problem.key for problem in caught.value.problems] == [
        "targtes",
        "cadence.collect_seconds",
        "retention.raw_hours",
        "hosts[0]",
    ]
    assert str(caught.value).startswith(f"{path}: 4 errors\n  {path}:1:1: targtes:")


def test_a_value_is_what_its_field_says_and_not_what_yaml_1_1_guesses() -> None:
    """`on`, `no`, `1e3`, `1:30`, `010` and bare numbers are names and models where a name or a model stands."""
    fleet = parse_fleet(
        "targets:\n"
        "  - {name: on, url: 'http://h/m'}\n"
        "  - {name: no, url: 'http://h/m'}\n"
        "  - {name: 010, url: 'http://h/m'}\n"
        "deployments: [{name: 2024-01-01, model: 1e3, price_usd_per_gpu_hour: 1e0, gpus_per_replica: '8'}]\n"
        "hosts: [{name: 1e5, local: on}]\n"
        "keep: [yes, 1:30]\n"
        "cadence:\n",
        {},
    )

    assert [target.name for target in fleet.targets] == ["on", "no", "010"]
    assert (fleet.deployments[0].name, fleet.deployments[0].model) == ("2024-01-01", "1e3")
    assert (fleet.deployments[0].price_usd_per_gpu_hour, fleet.deployments[0].gpus_per_replica) == (1.0, 8)
    assert fleet.hosts[0].local is True
    assert fleet.keep == ("yes", "1:30")
    assert fleet.cadence == Fleet().cadence


def test_variables_may_stand_alone_or_inside_and_stay_secret() -> None:
    """A token from the environment reaches the header and shows nowhere else."""
    text = (
        "targets:\n  - name: a\n    url: http://${HOST}:8000/metrics\n"
        "    headers: {Authorization: 'Bearer ${TOKEN}', X-Scope-OrgID: team-a, Cookie: 'session=${TOKEN}'}\n"
    )

    (target,) = parse_fleet(text, {"HOST": "10.0.0.5", "TOKEN": "hunter2"}).targets

    assert target.url == "http://10.0.0.5:8000/metrics"
    assert target.headers["Authorization"].get_secret_value() == "Bearer hunter2"
    assert target.headers["X-Scope-OrgID"].get_secret_value() == "team-a"
    assert "hunter2" not in f"{target!r} {target} {target.model_dump()} {target.model_dump_json()}"


def test_an_error_beside_a_secret_does_not_show_it() -> None:
    """Neither the message nor its traceback: a replaced value that is invalid is shown as it was written."""
    environ = {"TOKEN": "-".join(["hunter2"] * 2)}
    with pytest.raises(SettingsError) as caught:
        parse_fleet("cadence: {collect_seconds: '${TOKEN}'}\nkeep: ${TOKEN}\n", environ)

    assert "got '${TOKEN}'" in str(caught.value)
    assert environ["TOKEN"] not in "".join(traceback.format_exception(caught.value))


def test_a_variable_cannot_smuggle_credentials_into_a_url() -> None:
    """The URL is checked as it will be used; its row and its log line show it."""
    said = fault_of("targets: [{name: a, url: '${URL}'}]", URL="http://u:hunter2@h/metrics")

    assert "holds credentials" in said
    assert "hunter2" not in said


def test_what_cannot_be_read_says_what_to_do(tmp_path: Path) -> None:
    """A missing file, a folder, another encoding and a file without end each have a remedy."""
    (tmp_path / "latin.yaml").write_bytes(b"keep: [\xe9]")
    cases = {
        "none.yaml": "OPTIINFRA_FLEET",
        ".": "is a folder",
        "latin.yaml": "save it as UTF-8",
        "/dev/zero": "is larger",
    }

    for name, remedy in cases.items():
        with pytest.raises(SettingsError, match=remedy):
            load_fleet(tmp_path / name, {})


@given(text=st.text(max_size=200))
def test_no_text_whatever_is_worse_than_a_settings_error(text: str) -> None:
    """Garbage is a fleet or a SettingsError, never another exception."""
    assert all(problem.message for problem in problems_of(text))


_WORDS = st.sampled_from(
    ["", "a", "on", "null", "5s", "-1", "1e9", "${X}", "http://h/m", "http://[", "[]", "{}", "[a]", "{a: b}", "*x", "'"]
)
_KEYS = st.sampled_from([*Fleet.model_fields, "name", "url", "local", "model", "headers", "objectives", "nonsense"])


@given(st.lists(st.tuples(_KEYS, _KEYS, _WORDS), max_size=6), st.booleans())
def test_no_fleet_shaped_text_is_worse_than_a_settings_error(rows: list[tuple[str, str, str]], is_list: bool) -> None:
    """Right keys in wrong places with wrong values: every fault has a line of the file."""
    dash = "- " if is_list else "  "
    text = "".join(f"{top}:\n  {dash}{key}: {word}\n" for top, key, word in rows)
    assert all(1 <= problem.line <= text.count("\n") + 1 for problem in problems_of(text))


def test_state_is_one_folder_and_never_relative() -> None:
    """Dagster's processes start in other folders: a relative state would be several."""
    paths = find_paths({"OPTIINFRA_HOME": "/srv/optiinfra", "OPTIINFRA_FLEET": "/etc/fleet.yaml"})

    assert (paths.home, paths.fleet_file) == (Path("/srv/optiinfra"), Path("/etc/fleet.yaml"))
    assert {paths.warehouse_dir.parent, paths.dagster_home.parent, paths.reports_dir.parent} == {paths.home}
    assert find_paths({}).home == REPOSITORY / "state"
    assert find_paths({}).fleet_file == REPOSITORY / "fleet.yaml"
    with pytest.raises(SettingsError, match=r"OPTIINFRA_HOME: is 'state', a relative path; write it from the root"):
        find_paths({"OPTIINFRA_HOME": "state"})


def test_every_threshold_says_its_unit_reason_and_source_and_lies_in_its_range() -> None:
    """A number nobody can defend decides nothing here."""
    for name, threshold in THRESHOLDS.items():
        assert name == threshold.name
        assert threshold.minimum <= threshold.default <= threshold.maximum
        assert min(len(threshold.reason), len(threshold.source), len(threshold.unit)) > 0


def test_an_override_replaces_one_default() -> None:
    """What fleet.yaml sets holds; all else stays as defined."""
    fleet = parse_fleet("thresholds: {stale_after_seconds: 45}", {})
    values = threshold_values(fleet.thresholds)

    assert values["stale_after_seconds"] == 45.0
    assert values["breaker_failures_to_open"] == THRESHOLDS["breaker_failures_to_open"].default
    with pytest.raises(KeyError, match="nonsense"):
        threshold_values({"nonsense": 1.0})


def test_a_file_of_prompts_is_looked_for_beside_the_fleet_file(tmp_path: Path) -> None:
    """Runs start in another folder than the person who wrote the path."""
    text = CHAT + "rollouts: {deployments: [{deployment: chat, quality_prompts: prompts.jsonl}]}"
    (tmp_path / "fleet.yaml").write_text(text)
    with pytest.raises(SettingsError, match=r"quality_prompts: .*prompts.jsonl is no file; write JSON lines such as"):
        load_fleet(tmp_path / "fleet.yaml", {})

    (tmp_path / "prompts.jsonl").write_text('{"prompt": "2+2=", "expect": "4"}\n')
    fleet = load_fleet(tmp_path / "fleet.yaml", {})

    assert fleet.rollouts.of("chat").quality_prompts == str(tmp_path / "prompts.jsonl")


def test_what_is_valid_and_will_not_work_as_meant_is_a_warning() -> None:
    """Nobody who could prove themselves, pages nobody collects, fewer candidates than all traffic needs."""
    text = CHAT + HAPROXY.replace("stable: [", "stable: [{server: s2, url: 'http://h:3'}, ")
    text += "  approvers: [bob]\n  must_prove_approver: true\n"
    fleet = parse_fleet(text, {})

    said = rollout_warnings(fleet, {})
    assert [word.split(";")[0][:60] for word in said] == [
        "must_prove_approver: nobody can approve, for none of these i",
        "chat: the metrics page of s2, s is no target, so margins and",
        "chat: 1 candidate servers for 2 stable ones",
    ]
    assert len(rollout_warnings(fleet, {"OPTIINFRA_APPROVER_SECRET_BOB": "x"})) == 2
    assert rollout_warnings(parse_fleet(CHAT, {}), {}) == []


def test_what_a_remote_target_lacks_is_told_before_the_first_rollout() -> None:
    """No gateway that counts, and no token: each valid, and each would surprise in the middle of a rollout."""
    kubernetes = "{namespace: llm, deployment: chat, route: chat, backend: chat}"
    orchestrator = '{url: "https://orchestrator.example"}'
    section = f"rollouts:\n  deployments:\n    - deployment: chat\n      kubernetes: {kubernetes}\n"
    fleet = parse_fleet(f"{CHAT}{section}      orchestrator: {orchestrator}\n", {})

    [gateway, token] = rollout_warnings(fleet, {})
    assert "errors that clients saw are not judged" in gateway
    assert "OPTIINFRA_ORCHESTRATOR_TOKEN is not set" in token
    assert rollout_warnings(fleet, {"OPTIINFRA_ORCHESTRATOR_TOKEN": "t"}) == [gateway]
