"""What every noun is made of: the frozen, closed base, and the few kinds of values that many nouns share.

Here: types without a meaning of their own. Not here: any noun; those are the other modules of `domain`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,62}$")]
Engine = Literal[
    "vllm", "sglang", "tgi", "trtllm", "triton", "dynamo_frontend", "dynamo_worker", "llamacpp", "lmcache", "lmcache_mp"
]
Source = Literal["live", "recorded", "simulated"]
Ratio = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Frozen(BaseModel):
    """What every noun of ours is: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")
