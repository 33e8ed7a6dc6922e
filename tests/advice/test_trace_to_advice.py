"""From a public trace to advice as a person does it: the command line and the launchpad, and SQL on what they made."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
from click.testing import CliRunner, Result

from optiinfra_pipelines.cli import main
from optiinfra_pipelines.defs.traces import trace_jobs

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


def data(name: str) -> pl.DataFrame:
    folder = os.environ.get("OPTIINFRA_DATA")
    if not folder:
        pytest.skip("OPTIINFRA_DATA is not set: the public traces are not part of the project")
    return pl.read_parquet(Path(folder) / "data" / name)


def optiinfra(home: Path, *arguments: str) -> Result:
    """The command in this process; `home` is the live state folder, which no trace may enter."""
    return CliRunner().invoke(main, ["--home", str(home), *arguments], catch_exceptions=False)


def asked(into: Path, query: str) -> Any:
    found = optiinfra(into, "sql", query, "--json")
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


@pytest.fixture(scope="module")
def short_trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty minutes of two requests a second with shared prefixes."""
    path = tmp_path_factory.mktemp("short") / "t.jsonl"
    lines = [
        {"timestamp": place * 500, "input_length": 1024, "output_length": 9, "hash_ids": [place % 50, 99 + place % 400]}
        for place in range(4800)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_launchpad_imports_and_shows_what_the_advice_makes_of_it(short_trace: Path, tmp_path: Path) -> None:
    """One run: what came in, the tables' headlines and the pictures, as each asset's own page would show them."""
    [job] = trace_jobs(tmp_path / "live", lambda: NOW)
    config = {"source": str(short_trace), "format": "mooncake", "into": str(tmp_path / "into"),
              "model": "meta-llama/Llama-3.1-8B-Instruct"}  # fmt: skip
    found = job.execute_in_process(run_config={"ops": {"read_trace": {"config": config}}})
    [told] = [event.step_output_data.metadata for event in found.all_events if event.is_successful_output]

    assert told["requests"].value == told["accesses"].value == 4800
    for picture in ("scaling_backtest: pareto", "kv_reuse_curve: reuse_curve"):
        assert "data:image/png;base64,iVBORw0KGgo" in str(told[picture].value)
    assert told["kv_reuse_curve: curves"].value == 1
    rows = asked(tmp_path / "into", "select max(capacity_bytes) as most from kv_reuse_curve")
    assert rows == [{"most": 450 * 512 * 131_072}]  # 8B in 16 bits: 128 KiB a token
    assert asked(tmp_path / "into", "select count(*) as n from scaling_backtest where is_pareto")[0]["n"] >= 1


def test_the_launchpad_says_what_is_wrong_with_a_trace(tmp_path: Path) -> None:
    """The run fails with file, line and remedy, and does not try again."""
    (tmp_path / "t.jsonl").write_text('{"timestamp": 0, "input_length": -1, "output_length": 1, "hash_ids": []}\n')
    [job] = trace_jobs(tmp_path / "live", lambda: NOW)
    config = {"source": str(tmp_path / "t.jsonl"), "format": "mooncake", "into": str(tmp_path / "into")}
    failed = job.execute_in_process(run_config={"ops": {"read_trace": {"config": config}}}, raise_on_error=False)
    [event] = [event for event in failed.all_events if event.is_step_failure]
    assert isinstance(event, dg.DagsterEvent)
    assert "t.jsonl: line 1" in str(event.step_failure_data.user_failure_data)


def test_the_command_line_prints_the_advice_and_leaves_its_pictures(short_trace: Path, tmp_path: Path) -> None:
    """Tables on the screen, PNG files in the trace's folder, and the live folder untouched."""
    into = tmp_path / "into"
    found = optiinfra(
        tmp_path / "live", "import-trace", str(short_trace), str(into), "--format", "mooncake", "--analyze"
    )
    assert found.exit_code == 0, found.output
    for said in ("imported 4,800 requests over 40 minutes, block ids of 4,800", "keda_load 0.9", "token_ceiling_ratio"):
        assert said in found.output
    pictures = sorted(path.name for path in (into / "pictures").iterdir())
    assert pictures == ["kv_reuse_curve_reuse_curve.png", "scaling_backtest_pareto.png"]
    assert not (tmp_path / "live").exists()
    again = optiinfra(tmp_path / "live", "import-trace", str(short_trace), str(into), "--format", "mooncake")
    assert again.exit_code == 1
    assert "t.jsonl already; name another folder" in " ".join(again.output.split())


def published(name: str, folder: Path) -> tuple[Path, str]:
    """A public trace in the format it was published in, and the name of that."""
    match name:
        case "mooncake":
            trace = data("mooncake_conversation_blocks512.parquet")
            names = {"timestamp_ms": "timestamp", "input_tokens": "input_length", "output_tokens": "output_length"}
            trace.rename(names).write_ndjson(folder / "t.jsonl")
            return folder / "t.jsonl", name
        case "azure":
            data("azure_llm_2023_conv_requests.parquet").select(
                TIMESTAMP=pl.col("timestamp").dt.strftime("%Y-%m-%d %H:%M:%S.%6f0"),
                ContextTokens="input_tokens",
                GeneratedTokens="output_tokens",
            ).write_csv(folder / "t.csv", line_terminator="\r\n")
            return folder / "t.csv", name
        case "burstgpt":  # derived: the requests that a vLLM server was given from it, in its columns
            log = data("vllm_request_log.parquet").filter(pl.col("load_scale") == 100).sort("record_time")
            log.select(
                (pl.col("record_time") - log["record_time"][0]).alias("Timestamp"),
                pl.lit("ChatGPT").alias("Model"),
                pl.col("in_len").cast(pl.Int64).alias("Request tokens"),
                pl.col("out_len").cast(pl.Int64).alias("Response tokens"),
            ).write_csv(folder / "t.csv")
            return folder / "t.csv", name
        case "lmcache":  # derived: the Mooncake trace's blocks as the chunks a cache server logs
            trace = data("mooncake_conversation_blocks512.parquet")
            lines = (
                {"timestamp": 1_699_999_980 + at / 1000, "request_id": f"r{place}", "model_name": "m",
                 "chunk_size": 512, "seq_len": tokens, "chunk_hashes": [hex(one) for one in ids]}
                for place, (at, tokens, _, ids) in enumerate(trace.iter_rows())
            )  # fmt: skip
            (folder / "lookup_hashes_20231114_000000_000000.jsonl").write_text("\n".join(map(json.dumps, lines)))
            return folder, name
        case _:
            clients = data("servegen_client_load_10min.parquet").filter(pl.col("fleet").cast(pl.String) == name)
            for (client,), own in clients.sort("window_start_s").group_by("client", maintain_order=True):
                columns = ("window_start_s", "requests_per_s", "interarrival_cv", "interarrival_dist")
                own.select(*columns, "dist_param1", "dist_param2").write_csv(
                    folder / f"chunk-{client}-trace.csv", include_header=False
                )
                lengths = {
                    str(window): {"input_tokens": str({tokens: 1.0}), "output_tokens": str({out: 1.0})}
                    for window, tokens, out in own.drop_nans(["mean_input_tokens", "mean_output_tokens"])
                    .drop_nulls(["mean_input_tokens", "mean_output_tokens"])
                    .group_by(pl.col("window_start_s") // 21_600 * 21_600, maintain_order=True)
                    .agg(pl.col("mean_input_tokens").first(), pl.col("mean_output_tokens").first())
                    .iter_rows()
                }
                (folder / f"chunk-{client}-dataset.json").write_text(json.dumps(lengths))
            return folder, "servegen"


WHOLE = {
    "mooncake": {"requests": 6966, "minutes": 36},
    "azure": {"requests": 19_366, "minutes": 59},
    "burstgpt": {"requests": 500, "minutes": 8},
    "lmcache": {"requests": 6966, "minutes": 36},
    "deepseek-r1": {"minutes": 1440},
    "m-small": {"minutes": 14_400},
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", WHOLE)
def test_a_public_trace_of_every_format_becomes_advice(name: str, tmp_path: Path) -> None:
    """Every request arrives, every advice table answers SQL, and what is known of the trace comes out again."""
    (tmp_path / "source").mkdir()
    source, form = published(name, tmp_path / "source")
    into = tmp_path / "into"
    found = optiinfra(tmp_path / "live", "import-trace", str(source), str(into), "--format", form, "--analyze")
    assert found.exit_code == 0, found.output
    marker = json.loads((into / "imported_trace.json").read_text())
    counted = asked(into, "select count(requests_per_second) as minutes from int_load_minutes")[0]
    assert {"requests": marker["requests"], **counted} | WHOLE[name] == {"requests": marker["requests"], **counted}

    tables = ("load_forecast", "replica_capacity", "scaling_recommendations", "scaling_backtest", "kv_reuse_curve",
              "kv_working_set", "kv_cache_recommendations")  # fmt: skip
    for table in tables:
        rows = asked(into, f"select count(*) as n, count(reason) as told from {table}")[0]
        assert rows["n"] == rows["told"]
        assert rows["n"] > 0 or (table, name) == ("load_forecast", "burstgpt")  # eight minutes hold no whole step
    if form in ("mooncake", "lmcache"):
        sizes = asked(into, "select * from kv_cache_recommendations")[0]
        assert sizes["token_ceiling_ratio"] == pytest.approx(0.3525, abs=5e-5)
        assert sizes["block_ceiling_ratio"] == pytest.approx(0.3459, abs=5e-5)
        assert sizes["blocks_for_95"] == pytest.approx(35_090, rel=2e-4)
    if form == "servegen":
        assert (into / "pictures/load_forecast_fan_chart.png").stat().st_size > 2000
        assert asked(into, "select count(p50) as n from load_forecast")[0]["n"] == 12
        assert asked(into, "select count(*) as n from scaling_backtest where is_advised")[0]["n"] == 1
