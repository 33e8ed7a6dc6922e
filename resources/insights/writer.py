"""Write the insight of a moment: by the language model where it may and its text holds, else by the template.

Here: when to ask, the day's budget, the 30 s over everything, the one retry with the faults named, and why a text was
not used. Not here: the request itself (`service`), what is remembered (`store`), whether a text is
grounded (`analysis.insights.grounding`).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Protocol

import structlog
from pydantic import SecretStr, ValidationError

from optiinfra_pipelines.analysis.insights.evidence import evidence_hash, subjects_hash
from optiinfra_pipelines.analysis.insights.grounding import Fault, faults_of
from optiinfra_pipelines.analysis.insights.prompt import PROMPT_VERSION, messages_for, reply_schema
from optiinfra_pipelines.analysis.insights.template import template_narrative
from optiinfra_pipelines.domain.insights import EvidencePack, Insight, Narrative
from resources.insights.service import MAX_REPLY_TOKENS, MODEL, Failure, GroqService, Reply
from resources.insights.store import Budget, InsightStore

_log = structlog.get_logger(__name__)

DEADLINE_SECONDS = 30.0
# Under this much time left a reply of a thousand tokens is not to be expected.
_LEAST_SECONDS = 0.5
_PAUSE_AFTER_FAILURE_SECONDS = 1.0
# The same claims with moved numbers are explained anew this often; with new claims, at once.
REFRESH_AFTER = timedelta(hours=1)
_BASE_URL = "https://api.groq.com"


class Service(Protocol):
    """What answers one question."""

    def ask(
        self, messages: list[dict[str, str]], schema: dict[str, object], deadline_seconds: float
    ) -> Reply | Failure: ...


@dataclass(frozen=True)
class TokenPrice:
    """US dollars per million tokens, as your contract with the service says."""

    input_usd: float
    output_usd: float

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.input_usd + completion_tokens * self.output_usd) / 1e6


@dataclass
class _Attempt:
    """What one `write` has used so far. until: the deadline on the monotonic clock, from the first question on."""

    until: float = 0.0
    calls: int = 0
    tokens: int = 0
    usd: float | None = 0.0
    is_counted: bool = True
    faults: list[Fault] = field(default_factory=list)


class InsightWriter:
    """Writes insights within a budget.

    environ: GROQ_API_KEY and, for another address, GROQ_BASE_URL; read here and kept nowhere else. clock: now, UTC.
    price: None counts tokens only. monotonic and sleep are time's own but for tests.
    """

    def __init__(
        self,
        store: InsightStore,
        environ: Mapping[str, str],
        clock: Callable[[], datetime],
        *,
        price: TokenPrice | None = None,
        budget: Budget | None = None,
        deadline_seconds: float = DEADLINE_SECONDS,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._key = SecretStr(environ.get("GROQ_API_KEY", "").strip())
        self._base_url = environ.get("GROQ_BASE_URL") or _BASE_URL
        self._clock = clock
        self._price = price
        self._budget = budget or Budget()
        self._deadline_seconds = deadline_seconds
        self._monotonic = monotonic
        self._sleep = sleep

    def write(self, pack: EvidencePack) -> Insight:
        """The insight on this evidence. Never raises for the service's sake: the template says why it stands in."""
        salt = f"{MODEL} {PROMPT_VERSION}"
        key, subjects = evidence_hash(pack, salt), subjects_hash(pack)
        attempt = _Attempt()
        if not any(item.kind != "status" for item in pack.items):
            return self._template(pack, key, subjects, "there is nothing to explain", attempt)
        if not self._key.get_secret_value():
            return self._template(pack, key, subjects, "GROQ_API_KEY is not set", attempt)
        now = self._clock()
        known = self._store.recall(key, subjects, now - REFRESH_AFTER, now)
        if known.insight is not None:
            return known.insight
        if known.paused_until is not None:
            reason = f"the service asked not to be called before {known.paused_until:%Y-%m-%d %H:%M} UTC"
            return self._template(pack, key, subjects, reason, attempt)
        # Waiting for the warehouse until here is not the service's time.
        attempt.until = self._monotonic() + self._deadline_seconds
        outcome = self._asked(pack, attempt)
        if isinstance(outcome, str):
            _log.warning("insight_by_template", reason=outcome)
            return self._template(pack, key, subjects, outcome, attempt)
        insight = self._insight(pack, outcome, key, subjects, attempt).model_copy(
            update={"writer": "model", "model": MODEL, "reason": "every number and name was found in the evidence"}
        )
        self._store.keep(insight)
        return insight

    def _asked(self, pack: EvidencePack, attempt: _Attempt) -> Narrative | str:
        """The model's narrative that passed the check; else why there is none."""
        service: Service = GroqService(self._key.get_secret_value(), self._base_url)
        refusal = ""
        for _ in range(2):
            reply = self._answer(service, pack, attempt)
            if isinstance(reply, str):
                return f"{reply}; before that: {refusal}" if refusal else reply
            narrative = _checked(reply, pack, attempt)
            if narrative is not None:
                return narrative
            refusal = "the model's text was refused: " + _first_faults(attempt.faults)
        return refusal

    def _answer(self, service: Service, pack: EvidencePack, attempt: _Attempt) -> Reply | Failure | str:
        """One answer, or a failure that asking anew with its fault named may cure, or why there is none.

        A busy or failing service is asked a second time where the time allows what it asks for.
        """
        messages = messages_for(pack, attempt.faults)
        is_repeated = False
        while True:
            left = attempt.until - self._monotonic()
            if left < _LEAST_SECONDS:
                return f"the {self._deadline_seconds:.0f} s for an insight were used up"
            result = self._call(service, messages, left, attempt)
            if not isinstance(result, Failure):
                return result
            if result.meaning == "unusable":
                return result
            wait = result.retry_after_seconds
            if result.meaning == "busy" and wait is not None and wait > attempt.until - self._monotonic():
                self._store.pause(self._clock() + timedelta(seconds=wait), result.reason)
                return f"{result.reason} and asked for {wait:.0f} s, more than the time left"
            if result.meaning == "refused" or is_repeated:
                return result.reason
            is_repeated = True
            pause = wait if wait is not None else _PAUSE_AFTER_FAILURE_SECONDS
            if pause + _LEAST_SECONDS > attempt.until - self._monotonic():
                return result.reason
            self._sleep(pause)

    def _call(
        self, service: Service, messages: list[dict[str, str]], left: float, attempt: _Attempt
    ) -> Reply | Failure | str:
        """One request within the day's budget, which takes beforehand what it may cost at most."""
        # A token is at least one byte of ASCII and on such text about four; three are on the safe side.
        prompt_most = sum(len(message["content"]) for message in messages) // 3 + 200
        usd_most = self._price.of(prompt_most, MAX_REPLY_TOKENS) if self._price else 0.0
        call_id = uuid.uuid4().hex
        if not self._store.reserve(call_id, self._clock(), prompt_most + MAX_REPLY_TOKENS, usd_most, self._budget):
            return f"today's budget of {self._budget.tokens:,} tokens" + (
                f" or ${self._budget.usd:.2f} is used up" if self._price else " is used up"
            )
        attempt.calls += 1
        result = service.ask(messages, reply_schema(), left)
        self._settle(call_id, result, attempt)
        return result

    def _settle(self, call_id: str, result: Reply | Failure, attempt: _Attempt) -> None:
        if isinstance(result, Failure):
            if result.is_unbilled:
                self._store.settle(call_id, 0, 0.0)
            else:
                attempt.is_counted = False
            return
        if result.prompt_tokens is None or result.completion_tokens is None:
            attempt.is_counted = False
            return
        tokens = result.prompt_tokens + result.completion_tokens
        usd = self._price.of(result.prompt_tokens, result.completion_tokens) if self._price else None
        self._store.settle(call_id, tokens, usd or 0.0)
        attempt.tokens += tokens
        attempt.usd = attempt.usd + usd if attempt.usd is not None and usd is not None else None

    def _template(self, pack: EvidencePack, key: str, subjects: str, reason: str, attempt: _Attempt) -> Insight:
        insight = self._insight(pack, template_narrative(pack), key, subjects, attempt).model_copy(
            update={"reason": reason}
        )
        self._store.keep(insight)
        return insight

    def _insight(self, pack: EvidencePack, narrative: Narrative, key: str, subjects: str, attempt: _Attempt) -> Insight:
        return Insight(
            narrative=narrative,
            evidence=pack,
            writer="template",
            reason="",
            written_at=self._clock(),
            evidence_hash=key,
            subjects_hash=subjects,
            calls=attempt.calls,
            tokens=attempt.tokens if attempt.is_counted else None,
            usd=attempt.usd if attempt.is_counted and self._price else None,
        )


def _checked(reply: Reply | Failure, pack: EvidencePack, attempt: _Attempt) -> Narrative | None:
    """The narrative when it is one and is grounded; else None, and the faults in `attempt`."""
    if isinstance(reply, Failure):
        attempt.faults = [Fault("reply", "", reply.reason)]
        return None
    try:
        narrative = Narrative.model_validate_json(reply.text)
    except ValidationError as error:
        # Without the input: it is text of the model, and the log is no place for it.
        details = error.errors(include_url=False, include_input=False, include_context=False)
        attempt.faults = [
            Fault("reply", "", f"{'.'.join(map(str, one['loc'])) or 'the whole'}: {one['msg']}") for one in details[:5]
        ]
        return None
    attempt.faults = faults_of(narrative, pack)
    return None if attempt.faults else narrative


def _first_faults(faults: list[Fault]) -> str:
    shown = "; ".join(f"{fault.section} {fault.problem}" for fault in faults[:2])
    return shown + (f" (and {len(faults) - 2} more)" if len(faults) > 2 else "")
