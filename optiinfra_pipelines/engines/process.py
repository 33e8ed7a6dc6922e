"""What every Python server prints beside its engine's families: the process, and FastAPI's HTTP counters.

Here: those two tables. Not here: which page has them (`plan` adds them to every dialect). Neither has a rank label,
so their values stand in the lowest rank's row only.
"""

from __future__ import annotations

from collections.abc import Mapping

from optiinfra_pipelines.engines.dialect import Alternatives, Take, is_, take

# Routes that ask a model for something, over vLLM, SGLang and OpenAI-compatible servers. Everything else that HTTP
# counters see (metrics, health, admin, documentation) would dilute an error ratio.
INFERENCE_ROUTES = (
    "/v1/completions*",
    "/v1/chat/completions*",
    "/v1/responses*",
    "/v1/messages*",
    "/v1/embeddings*",
    "/v1/audio/*",
    "/v1/rerank",
    "/v2/rerank",
    "/v1/score",
    "/v1/classify",
    "/rerank",
    "/score",
    "/classify",
    "/pooling",
    "/generate",
    "/generate_stream",
    "/encode",
    "/invocations",
    "/inference/v1/generate",
    "/api/chat",
    "/api/generate",
)

PROCESS: Mapping[str, Alternatives] = {
    "cpu_seconds_total": take("process_cpu_seconds_total"),
    "resident_memory_bytes": take("process_resident_memory_bytes"),
}


def http_columns(name: str, route_label: str, status_label: str) -> Mapping[str, Alternatives]:
    """Columns from a counter of HTTP answers by route and status ('2xx' or '200')."""
    routes = is_(route_label, *INFERENCE_ROUTES)
    return {
        "http_requests_total": (Take(name, where=(routes,), zero_when_absent=True),),
        "http_4xx_total": (Take(name, where=(routes, is_(status_label, "4*")), zero_when_absent=True),),
        "http_5xx_total": (Take(name, where=(routes, is_(status_label, "5*")), zero_when_absent=True),),
    }
