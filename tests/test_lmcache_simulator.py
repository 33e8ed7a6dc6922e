"""Our reuse curve beside the cache simulator that LMCache ships, on one public trace written as its lookup log."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from optiinfra_pipelines.analysis.kv_cache.curve import measure_reuse
from resources.traces.files import read_requests, succession

SIZES = (1_000, 10_000, 30_000, 50_000, 10_000_000)  # in chunks; the last holds all
SIMULATE = """
import json, sys
from pathlib import Path
from lmcache.tools.cache_simulator.simulator import load_lookup_events, simulate
events = load_lookup_events([Path(sys.argv[1])])
print(json.dumps([simulate(events, size, 1, True)["token_hit_rate"] for size in map(int, sys.argv[2:])]))
"""


@pytest.mark.engine
def test_lmcaches_own_simulator_says_the_same(tmp_path: Path) -> None:
    """The same ceiling; under a tenth of a point apart at every size, for it touches a prefix from its head."""
    program, folder = shutil.which("lmcache"), os.environ.get("OPTIINFRA_DATA")
    if program is None or not folder:
        pytest.skip("needs an installed LMCache (its cache simulator), and OPTIINFRA_DATA for the public trace")
    trace = pl.read_parquet(Path(folder) / "data/mooncake_conversation_blocks512.parquet")
    lines = [
        {"timestamp": at / 1000, "request_id": str(place), "model_name": "m", "chunk_size": 512, "seq_len": tokens,
         "dtypes": ["bfloat16"], "shapes": [[2, 1, 512, 1]], "chunk_hashes": [hex(one) for one in ids[: tokens // 512]]}
        for place, (at, tokens, _, ids) in enumerate(trace.iter_rows())
    ]  # fmt: skip
    log = tmp_path / "lookup_hashes_20240101_000000_000000.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    python = Path(program).resolve().parent / "python"
    sizes = [str(size) for size in SIZES]
    printed = subprocess.run([python, "-c", SIMULATE, log, *sizes], check=True, capture_output=True, text=True).stdout
    theirs = json.loads(printed.splitlines()[-1])

    reuse = measure_reuse(pl.concat(read_requests(tmp_path, "lmcache", lambda share: None, succession("lmcache"))))
    ours = reuse.hit_ratio(np.array(SIZES), "token")
    assert ours.tolist() == pytest.approx(theirs, abs=1e-3)
    assert ours[-1] == pytest.approx(theirs[-1], abs=1e-9)
