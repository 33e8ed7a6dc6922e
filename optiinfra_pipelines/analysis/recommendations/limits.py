"""The numbers that the tuning rules and the ledger go by, each with unit, reason and source.

Here so that one page shows them all. A rule's own conditions stand in its row of `rules`.
"""

from __future__ import annotations

# Samples and seconds a window must hold. Five samples at the 5 s cadence tell a queue from a blip when all but the
# edges show it; a count of events brings its own lower bound (exact Poisson, 95 %) in place of a least number.
MIN_SAMPLES = 5
MIN_WINDOW_SECONDS = 20.0
# Past this the increments say little about the gauges between: the collector's own staleness limit.
MAX_GAP_SECONDS = 30.0
# CUDA graphs, kernels compiled at first use and a cold prefix cache: the first minute is no steady state.
WARM_UP_SECONDS = 60.0
# vLLM preempts when no block is free; from here one long prompt is enough.
KV_FULL_RATIO = 0.95
# A scrape may fall between a request's end and the next one's start: a slot or two of 16 stand empty for a step.
AT_CEILING_RATIO = 0.9
# Batch slots may be raised until the KV cache would be this full at the present mix (the head room is for the
# spread of request lengths).
KV_TARGET_RATIO = 0.8
# Chance that a full batch outgrows the KV cache that batch slots are cut to.
OVERFLOW_CHANCE = 0.10
# Most of the GPU's memory that may be promised to the engine: vLLM's auto_tune starts at 0.98 and steps down to 0.90
# until a start succeeds; 0.95 leaves room for the peak of activations.
MAX_MEMORY_SHARE = 0.95
MEMORY_SHARE_STEP = 0.02
# Bytes that must stay free on the GPU beside the step: fragmentation, NCCL, another process's context.
MEMORY_MARGIN_BYTES = 1024**3
# Of a deployment's usable replicas, how many must show it before a common flag is to blame; below, balance is.
MIN_REPLICA_SHARE = 0.5
# One knob is not turned the other way within this, and one recommendation not remade.
OPPOSITE_HOURS = 24.0
# An open recommendation whose condition was not seen for this long is over.
EXPIRE_HOURS = 24.0
# Least number of measured effects at which a share may be quoted: at 20 the 95 % interval of 80 % is still 58 to 92 %.
MIN_ACCURACY_N = 20
