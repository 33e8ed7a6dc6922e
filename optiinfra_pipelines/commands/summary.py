"""The tables that `optiinfra demo --once` ends with: what was read, and what the marts made of it."""

from __future__ import annotations

SUMMARY: dict[str, str] = {
    "Targets": """
        select target, source, engine, engine_version as version, vantage,
               case when is_up then 'up' else error_kind_last end as state,
               up_24h_ratio * 100 as "up %", process_started_at as "engine started"
        from fct_scrape_health
        order by target
    """,
    "Load (whole recording, or what was seen of it)": """
        select target, source,
               sum(requests_finished) as "requests",
               sum(prompt_tokens) as "tokens in",
               sum(generation_tokens) as "tokens out",
               max(requests_running_max) as "max running",
               max(requests_waiting_max) as "max waiting",
               max(kv_cache_usage_max_ratio) * 100 as "max KV %",
               sum(preemptions) as preemptions
        from fct_replica_load_5m
        group by all
        order by target
    """,
    "Latency (s): p50 and p95 each lie in their bucket; the number inside is interpolated": """
        with merged as (
            select target, metric, source_metric, is_proxy, bounds_id,
                   sum(observation_count) as n,
                   sum(observation_sum) / nullif(sum(observation_count), 0) as mean,
                   histogram_merge(list(bucket_increments)) as buckets
            from fct_latency_5m
            where metric in ('time_to_first_token_seconds', 'inter_token_latency_seconds', 'request_duration_seconds')
            group by all
        )
        select target, replace(metric, '_seconds', '') || if(is_proxy, ' (proxy)', '') as metric, n, mean,
               histogram_quantile(0.5, upper_bounds, buckets) as p50,
               format('{:g}-{:g}', histogram_quantile_lower(0.5, upper_bounds, buckets),
                      histogram_quantile_upper(0.5, upper_bounds, buckets)) as "p50 in",
               histogram_quantile(0.95, upper_bounds, buckets) as p95,
               format('{:g}-{:g}', histogram_quantile_lower(0.95, upper_bounds, buckets),
                      histogram_quantile_upper(0.95, upper_bounds, buckets)) as "p95 in"
        from merged
        join raw_histogram_bounds using (bounds_id)
        where n > 0
        order by all
    """,
    "Findings (whole recording)": """
        select subject_name as subject, source, kind, cause, severity, since,
               coalesce(date_diff('second', since, until)::varchar || ' s', 'lasting') as lasted, summary
        from findings
        order by since
    """,
    "What to change first (and what the recordings called for before)": """
        select subject_name as subject, source, state, change_text as change,
               effect_signal || ' ' || printf('%+.3g', effect_low) || ' to ' || printf('%+.3g', effect_high)
                   || ' from ' || printf('%.3g', effect_before) as "expected effect",
               effect_basis as "obtained by", risk
        from recommendations
        order by state = 'open' desc, made_at
    """,
    "Prefix cache": """
        select target, tier, sum(queried_tokens) as "tokens asked", sum(hit_tokens) as "tokens found",
               100 * sum(hit_tokens) / nullif(sum(queried_tokens), 0) as "hit %"
        from fct_kv_cache_5m
        group by all
        having sum(queried_tokens) > 0
        order by all
    """,
    "This host (live)": """
        select host, source, telemetry, cpu_count as "CPUs", 100 * cpu_busy_ratio as "CPU busy %",
               100 * memory_used_max_ratio as "memory used %", 100 * psi_cpu_some_ratio as "waiting for CPU %"
        from fct_host_utilization_5m
        qualify row_number() over (partition by host order by period_at desc) = 1
    """,
    "GPUs (live)": """
        select host, status, gpu_count as "GPUs", detail
        from stg_gpu_collections
        qualify row_number() over (partition by host order by sampled_at desc) = 1
    """,
}
