"""Cost and accuracy of the reuse curve: exact and sampled, on the public traces under $OPTIINFRA_DATA/data.

Prints CPU seconds (best of several, all threads of this process), seconds of the first call in a fresh process, the
largest error of the sampled curve over 300 sizes and 20 seeds, and the error of the size for 95 % of the ceiling.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl

from optiinfra_pipelines.analysis.kv_cache.curve import block_trace, hit_ratio_curve, measure_reuse

MILLION = 1_000_000
FIRST_CALL = """
import time; start = time.process_time()
import polars as pl
from optiinfra_pipelines.analysis.kv_cache.curve import measure_reuse
imported = time.process_time()
measure_reuse(pl.DataFrame({"hash_ids": [list(range(n % 50)) for n in range(REQUESTS)]}))
print(f"{time.process_time() - imported:.2f}")
"""


def million(trace: pl.DataFrame) -> pl.DataFrame:
    """The trace repeated with fresh ids, as if so many such fleets came one after the other, cut at 1 M references."""
    copies = -(-MILLION // int(trace["hash_ids"].list.len().sum()))
    span = trace["hash_ids"].list.max().max()
    long = pl.concat(trace.select(pl.col("hash_ids") + number * span // 2, "input_tokens") for number in range(copies))
    return long.filter(long["hash_ids"].list.len().cum_sum() <= MILLION)


def main() -> None:
    data = Path(os.environ["OPTIINFRA_DATA"]) / "data"
    traces = {
        "conversation": pl.read_parquet(data / "mooncake_conversation_blocks512.parquet"),
        "tool calling": pl.read_parquet(data / "taubench_agent_prefix_blocks16.parquet").rename(
            {"input_tokens_est": "input_tokens"}
        ),
    }
    for name, requests in (("interpreted, 5,000 references", 200), ("compiled, 250,000 references", 10_000)):
        code = FIRST_CALL.replace("REQUESTS", str(requests))
        printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        print(f"first call in a fresh process, {name}: {printed.strip()} CPU s")
    for name, trace in traces.items():
        long = million(trace)
        block_size = 512 if name == "conversation" else 16
        for label, ratio in (("exact", None), ("sampled 10 %", 0.1)):
            costs = []
            for _ in range(10):
                start = time.process_time()
                hit_ratio_curve(measure_reuse(long, block_size=block_size, sample_ratio=ratio))
                costs.append(time.process_time() - start)
            references = int(long["hash_ids"].list.len().sum())
            print(f"{name}: {label}, {references:,} references: {min(costs):.3f} CPU s (median {np.median(costs):.3f})")
        laid_out = block_trace(trace)
        exact = measure_reuse(laid_out)
        sizes = np.unique(np.geomspace(1, laid_out.unique_blocks, 300).astype(np.int64))
        errors, size_errors = [], []
        for seed in range(20):
            sampled = measure_reuse(laid_out, sample_ratio=0.1, seed=seed)
            errors.append(np.abs(exact.hit_ratio(sizes, "block") - sampled.hit_ratio(sizes, "block")).max() * 100)
            size_errors.append(abs(sampled.size_for(0.95, "block") / exact.size_for(0.95, "block") - 1) * 100)
        print(
            f"{name}: sampled at {sampled.tracked_blocks / laid_out.unique_blocks:.1%} of blocks, largest error of the "
            f"curve {np.mean(errors):.2f} points in the mean of 20 seeds, {max(errors):.2f} in the worst; "
            f"size for 95 % of the ceiling off by {np.mean(size_errors):.1f} % in the mean, {max(size_errors):.1f} %"
        )


if __name__ == "__main__":
    main()
