"""What is wrong with a fleet.yaml, in words with a remedy: the checks of `optiinfra_pipelines.settings`.

Pure. `explain` turns what pydantic found into our words; `check_fleet` finds what a single field cannot know: names
used twice, references to nothing, credentials in plain sight. No message ever shows a header's value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, get_args
from urllib.parse import parse_qsl, urlsplit

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from optiinfra_pipelines.domain.fleet import Cadence, Fleet
from optiinfra_pipelines.domain.thresholds import THRESHOLDS
from optiinfra_pipelines.settings_yaml import Document, KeyPath, Value

# What a number under a key of this ending counts, and an example that is right.
_UNITS = (
    ("usd_per_gpu_hour", "US dollars per GPU and hour", "2.5"),
    ("_seconds", "seconds", "5"),
    ("_minutes", "minutes", "2"),
    ("_hours", "hours", "48"),
    ("_days", "days", "30"),
    ("_ratio", "a ratio from 0 to 1 (99 % is 0.99)", "0.99"),
    ("replicas", "replicas", "2"),
    ("gpus_per_replica", "GPUs", "8"),
    ("_percent", "percent", "10"),
    ("_concurrency", "targets at once", "100"),
)
_SECRET_NAME = re.compile(r"auth|cookie|token|secret|passw|api-?_?key|credential|signature", re.IGNORECASE)
_SECRET_SCHEME = re.compile(r"(?:bearer|basic|token|digest|apikey|negotiate)\s+\S", re.IGNORECASE)
# A word this long without a space, digits among its letters, is a key and not a tenant's name.
_SECRET_LOOKS = re.compile(r"(?=[^\s]*[0-9])(?=[^\s]*[A-Za-z])[A-Za-z0-9+/_.=\-]{24,}")
_HEADER_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+\Z")
_OUR_HEADERS = {"accept-encoding", "connection", "content-length", "transfer-encoding", "upgrade", "te", "expect"}
# Any of these makes a host readable that is not this machine.
_HOST_SOURCES = ("dcgm_exporter", "node_exporter", "gpu_series", "node_series")
_URL_KEYS = ("url", "dcgm_exporter", "node_exporter")
_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
_FALSE = {"false", "no", "off", "0", "f", "n"}
_LATENCIES = {"ttft", "tpot", "itl", "e2e"}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'targets'?`, or what is known when nothing is near."""
    names = sorted(known)
    near = get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(names)}" if names else "; there are none"


def explain(error: ErrorDetails, document: Document) -> tuple[KeyPath, str] | None:
    """The key and the sentence for one pydantic error; None when the key has been complained about already."""
    path: KeyPath = tuple(error["loc"])
    if path in document.faulty:
        return None
    key = next((part for part in reversed(path) if isinstance(part, str)), "")
    written = document.written.get(path)
    may_hold_secret = "headers" in path or key == "webhook" or (key in _URL_KEYS and "@" in (written or ""))
    got = f"; got {short(written)}" if written is not None and not may_hold_secret else ""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return path, f"unknown key{did_you_mean(str(path[-1]), _fields(path[:-1]))}"
    if kind == "missing":
        described = _fields(path[:-1])[key].description
        return path[:-1], f"has no {key!r}; add it" + (f": {described}" if described else "")
    if kind.startswith(("int_", "float_")) or kind == "finite_number":
        whole = "a whole number" if kind.startswith("int_") else "a number"
        return path, f"wants {whole}{_unit(key)}{got}"
    if kind in _BOUNDS:
        sign, words = _BOUNDS[kind]
        return path, f"must be {words} {context[sign]:g}{_unit(key, is_bound=True)}{got}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']+)'", str(context.get("expected", "")))
        return path, f"is not a known {key}{got}{did_you_mean(written or '', choices)}"
    if kind.startswith("bool_"):
        return path, f"wants true or false{got}"
    if kind == "string_pattern_mismatch" and key in _URL_KEYS:
        return path, f"wants a full URL, such as http://10.0.0.5:8000/metrics{got}"
    if kind == "string_pattern_mismatch":
        return path, f"wants letters, digits, '_', '-' and '.', 63 at most, the first a letter or digit{got}"
    if kind in ("tuple_type", "list_type"):
        return path, f"wants a list: one '- ' line for each entry{got}"
    if kind in ("model_type", "dict_type"):
        return path, f"wants `key: value` lines below it{got}"
    if kind.startswith("time_"):
        return path, f"wants a time of day as HH:MM, such as 22:00{got}"
    if kind == "value_error":
        # A sentence of our own nouns.
        return path, str(context["error"])
    if kind == "string_type":
        return path, "wants one word or number, not a list or a mapping"
    return path, f"is not valid: {error['msg']}{got}"


def short(text: str) -> str:
    """What was written, quoted, its beginning where it is long."""
    return repr(text if len(text) <= 40 else text[:39] + "…")


def _unit(key: str, *, is_bound: bool = False) -> str:
    """What the number under `key` counts, in words that go on from "a number" or from a bound."""
    for ending, unit, sample in _UNITS:
        if key.endswith(ending):
            if is_bound:
                return f" {unit}" if not unit.startswith("a ratio") else f", {unit}"
            return f" of {unit}, written without a unit, such as {sample}".replace(" of a ratio", ": a ratio")
    return ""


def _fields(path: KeyPath) -> Mapping[str, Any]:
    """Fields of the noun that stands at `path`; empty where a mapping is free."""
    model: type[BaseModel] | None = Fleet
    for part in path:
        if isinstance(part, int) or model is None:
            continue
        field = model.model_fields.get(part)
        model = _model_in(field.annotation) if field is not None else None
    return model.model_fields if model is not None else MappingProxyType({})


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := _model_in(part)) is not None), None)


def check_fleet(document: Document) -> None:
    """Add to `document.problems` what only the whole file shows. Works on whatever part of it is well-formed."""
    _check_keys_without_value(document)
    lists = {name: entries_of(document.value.get(name)) for name in ("targets", "deployments", "hosts")}
    for name, entries in lists.items():
        _check_names_are_unique(document, name, entries)
    known = {
        name: {str(entry["name"]) for entry in entries.values() if "name" in entry} for name, entries in lists.items()
    }
    for index, target in lists["targets"].items():
        for key, among in (("deployment", "deployments"), ("host", "hosts")):
            word = target.get(key)
            if isinstance(word, str) and word not in known[among]:
                message = f"{short(word)} is not among the {among}{did_you_mean(word, known[among])}"
                document.complain(("targets", index, key), message)
        headers = target.get("headers")
        if isinstance(headers, dict):
            _check_headers(document, ("targets", index, "headers"), headers)
    for name in ("targets", "hosts"):
        for index, entry in lists[name].items():
            for key in _URL_KEYS:
                if isinstance(entry.get(key), str):
                    check_url(document, (name, index, key), str(entry[key]))
    prometheus = document.value.get("prometheus")
    _check_hosts(document, lists["hosts"], has_server=prometheus is not None)
    if isinstance(prometheus, dict):
        if isinstance(prometheus.get("url"), str):
            check_url(document, ("prometheus", "url"), str(prometheus["url"]))
        if isinstance(prometheus.get("headers"), dict):
            _check_headers(document, ("prometheus", "headers"), prometheus["headers"])  # type: ignore[arg-type]
    alerts = document.value.get("alerts")
    if isinstance(alerts, dict) and isinstance(alerts.get("webhook"), str):
        _check_webhook(document, ("alerts", "webhook"), str(alerts["webhook"]))
    for index, deployment in lists["deployments"].items():
        _check_deployment(document, ("deployments", index), deployment)
    cadence = document.value.get("cadence")
    if isinstance(cadence, dict):
        _check_cadence(document, cadence)
    thresholds = document.value.get("thresholds")
    if isinstance(thresholds, dict):
        _check_thresholds(document, thresholds)


def _check_keys_without_value(document: Document) -> None:
    """A key that says nothing is left out of the values, and is wrong all the same where no such key is known."""
    for path in document.silent:
        *above, key = path
        if path[0] == "thresholds" and len(path) == 2 and key not in THRESHOLDS:
            document.complain(path, f"unknown threshold{did_you_mean(str(key), THRESHOLDS)}")
        known = _fields(tuple(above))
        if known and key not in known:
            document.complain(path, f"unknown key{did_you_mean(str(key), known)}")


def entries_of(value: Value | None) -> dict[int, dict[str, Value]]:
    """The entries of a list that are mappings, by their place in it; none where it is no list."""
    return {i: entry for i, entry in enumerate(value) if isinstance(entry, dict)} if isinstance(value, list) else {}


def _check_names_are_unique(document: Document, name: str, entries: Mapping[int, Mapping[str, Value]]) -> None:
    first: dict[str, int] = {}
    for index, entry in entries.items():
        word = entry.get("name")
        if not isinstance(word, str):
            continue
        if word in first:
            line = document.place((name, first[word], "name")).line
            message = f"{short(word)} is also the name on line {line}; names are unique within {name}, rename one"
            document.complain((name, index, "name"), message)
        first.setdefault(word, index)


def _check_headers(document: Document, path: KeyPath, headers: Mapping[str, Value]) -> None:
    seen: set[str] = set()
    for name, value in headers.items():
        here = (*path, name)
        written = document.written.get(here, "")
        if not _HEADER_NAME.match(name):
            document.complain(here, "is not a header's name (letters, digits and '-')")
        elif name.lower() in _OUR_HEADERS:
            document.complain(here, "is set by the collector itself; remove it")
        elif name.lower() in seen:
            document.complain(here, "is given twice (case does not count); keep one")
        elif not isinstance(value, str) or not value.isascii() or not value.isprintable():
            document.complain(here, "wants one line of ASCII text")
        elif _is_literal_secret(name, written):
            shape = f"{name}: Bearer ${{MY_TOKEN}}" if name.lower() == "authorization" else f"{name}: ${{MY_TOKEN}}"
            message = f"looks like a secret in plain sight; put it into the environment and write  {shape}"
            document.complain(here, message)
        seen.add(name.lower())


def _is_literal_secret(name: str, written: str) -> bool:
    """Whether a credential stands in the file itself. What `${NAME}` stands for does not count."""
    rest = re.sub(r"\$\{[^}]*\}", " ", written).strip()
    if _SECRET_LOOKS.search(rest) or _SECRET_SCHEME.match(rest):
        return True
    # Beside ${NAME} a credential header may hold its scheme ("Bearer") or the name of a cookie ("session=").
    return bool(_SECRET_NAME.search(name)) and ("${" not in written or len(rest) > 20)


def check_url(document: Document, path: KeyPath, url: str) -> None:
    """Complain about a URL that names no host, holds a secret, or cannot be asked."""
    if not url.startswith(("http://", "https://")):
        return  # the field's own pattern says it
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        document.complain(path, f"is not a URL: {str(error).replace(url, '…')}; write http://host:port/path")
        return
    if "@" in parts.netloc:
        message = "holds credentials; take them out and give them as a header: Authorization: Basic ${NAME}"
        document.complain(path, message)
    elif not parts.hostname or any(character.isspace() or not character.isprintable() for character in url):
        document.complain(path, "names no host, or holds a space; write http://host:port/path")
    elif port == 0:
        document.complain(path, "has port 0; write the port the endpoint listens on")
    elif parts.fragment:
        document.complain(path, "has a part after '#', which is never sent; remove it")
    elif any(_SECRET_NAME.search(key) for key, _ in parse_qsl(parts.query)):
        document.complain(path, "holds a secret in its query; URLs are shown, so give it as a header with ${NAME}")


def _check_webhook(document: Document, path: KeyPath, url: str) -> None:
    if "${" not in document.written.get(path, ""):
        message = "is a secret in plain sight: whoever has the URL can post; put it into the environment as ${NAME}"
        document.complain(path, message)
    elif not url.startswith(("http://", "https://")):
        document.complain(path, "stands for no URL; let its variable hold http:// or https:// and the rest")


def _check_hosts(document: Document, hosts: Mapping[int, Mapping[str, Value]], *, has_server: bool) -> None:
    local: int | None = None
    for index, host in hosts.items():
        is_local = str(host.get("local", "false")).lower() not in _FALSE
        if not is_local and not any(key in host for key in _HOST_SOURCES):
            message = (
                "has nothing to read; add `local: true`, the URL of a dcgm_exporter or node_exporter, or its "
                "gpu_series or node_series in the Prometheus server"
            )
            document.complain(("hosts", index), message)
        for key in ("gpu_series", "node_series"):
            if key in host and not has_server:
                message = "is asked of a Prometheus server, and none is named; add  prometheus: {url: http://host:9090}"
                document.complain(("hosts", index, key), message)
        if is_local and local is not None:
            line = document.place(("hosts", local)).line
            document.complain(("hosts", index, "local"), f"the host on line {line} is this machine already; keep one")
        if is_local and local is None:
            local = index


def _check_deployment(document: Document, path: KeyPath, deployment: Mapping[str, Value]) -> None:
    low, high = deployment.get("min_replicas"), deployment.get("max_replicas")
    if isinstance(low, str) and isinstance(high, str) and low.isdigit() and high.isdigit() and int(low) > int(high):
        document.complain((*path, "max_replicas"), f"is {high}, below min_replicas {low}; swap them or raise it")
    flags = deployment.get("flags")
    for flag in flags if isinstance(flags, dict) else ():
        if flag.startswith("-"):
            document.complain((*path, "flags", flag), f"wants the flag without its dashes: {flag.lstrip('-')}")
    for index, objective in entries_of(deployment.get("objectives")).items():
        here = (*path, "objectives", index)
        kind = objective.get("kind")
        if kind in _LATENCIES and "threshold_seconds" not in objective:
            message = f"a {kind} objective needs threshold_seconds, the latency that still counts as good"
            document.complain(here, message)
        elif kind in ("error_ratio", "availability", "goodput") and "threshold_seconds" in objective:
            document.complain((*here, "threshold_seconds"), f"means nothing for {kind}; remove it")


def _check_cadence(document: Document, cadence: Mapping[str, Value]) -> None:
    """A tick that waits longer than the next one may come is told by a number, not by gaps in the data."""
    given = {name: cadence[name] for name in ("scrape_deadline_seconds", "collect_seconds") if name in cadence}
    try:
        written = Cadence.model_validate(given)
    except ValidationError:
        return  # each number by itself is told where it stands
    if written.scrape_deadline_seconds >= written.collect_seconds:
        name = "scrape_deadline_seconds" if "scrape_deadline_seconds" in cadence else "collect_seconds"
        document.complain(
            ("cadence", name),
            f"a scrape may take {written.scrape_deadline_seconds:g} s and the next begins after "
            f"{written.collect_seconds:g} s; choose a scrape_deadline_seconds below collect_seconds",
        )


def _check_thresholds(document: Document, thresholds: Mapping[str, Value]) -> None:
    for name, value in thresholds.items():
        path: KeyPath = ("thresholds", name)
        known = THRESHOLDS.get(name)
        if known is None:
            document.complain(path, f"unknown threshold{did_you_mean(name, THRESHOLDS)}")
            continue
        try:
            number = float(value) if isinstance(value, str) else float("nan")
        except ValueError:
            number = float("nan")
        if not known.minimum <= number <= known.maximum:
            got = f"; got {short(document.written[path])}" if path in document.written else ""
            bounds = f"{known.minimum:.10g} to {known.maximum:.10g} (default {known.default:.10g})"
            document.complain(path, f"wants a number in {known.unit}, without the unit, from {bounds}{got}")
