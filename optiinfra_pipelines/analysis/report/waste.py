"""What the report asks of waste and cost: GPU states, dollars, what tokens cost, the goals that operators state.

Pure: titles and SQL with the parameters $since, $until. Running it is `resources.report.reader`, showing it `sections`.
A goal on a duty cycle is shown as the share of time that reached it, with what says more beside it: a GPU may be busy
all the time and work little, and a CPU may be busy and keep nobody waiting.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

GPU_STATES = """
    select host, state, sum(gpu_hours) as gpu_hours
    from fct_gpu_waste
    where day >= $since::date and day <= $until::date
    group by all
    order by all
"""
COSTS = "select deployment, usd from fct_deployment_costs where $since <= $until order by deployment"

_STATED = """
    with gpus as (
        select
            count(*) filter (gpu_utilization_mean_ratio >= 0.8) / nullif(count(gpu_utilization_mean_ratio), 0) as share,
            sum(sm_active_mean_ratio * sample_count)
                / nullif(sum(sample_count) filter (sm_active_mean_ratio is not null), 0) as honest,
            count(gpu_utilization_mean_ratio) as n
        from fct_gpu_utilization_5m
        where period_at >= $since and period_at < $until
    ),
    hosts as (
        select
            count(*) filter (cpu_busy_ratio >= 0.7) / nullif(count(cpu_busy_ratio), 0) as share,
            sum(psi_cpu_some_ratio * sample_count)
                / nullif(sum(sample_count) filter (psi_cpu_some_ratio is not null), 0) as honest,
            count(cpu_busy_ratio) as n
        from fct_host_utilization_5m
        where period_at >= $since and period_at < $until
    ),
    idle as (
        select
            day > $until::date - 7 as is_now,
            sum(gpu_hours) filter (state like 'idle%') / nullif(sum(gpu_hours) filter (state <> 'unknown'), 0) as share
        from fct_gpu_waste
        where day > $until::date - 14 and day <= $until::date
        group by all
    ),
    weeks as (
        select max(share) filter (is_now) as now, max(share) filter (not is_now) as before, count(*) as n from idle
    )
    select
        'GPU over 80 %' as goal, 'share of GPU time with a duty cycle of 80 % or more' as measured_as,
        share as reached_ratio, 'mean SM activity' as honest_measure, honest as honest_ratio, n as periods
    from gpus
    union all
    select
        'CPU over 70 %', 'share of host time with 70 % or more of the CPUs busy', share,
        'mean share of time in which a task waited for a CPU', honest, n
    from hosts
    union all
    select
        'idle GPU time halved', 'of the halving, how much the last 7 days reached against the 7 before',
        case when before > 0 then least(1.0, greatest(0.0, (before - coalesce(now, 0)) / (before / 2))) end,
        'idle share of the known GPU-hours, last 7 days', now, n
    from weeks
"""
TABLES: Mapping[str, str] = MappingProxyType(
    {
        "GPU-hours and dollars by host and state, UTC days of the window": """
            select host, state, sum(gpu_hours) as gpu_hours,
                   if(count(usd) = count(*), sum(usd), null) as usd,
                   if(count(usd_low) = count(*), sum(usd_low), null) as low_usd,
                   if(count(usd_high) = count(*), sum(usd_high), null) as high_usd
            from fct_gpu_waste
            where day >= $since::date and day <= $until::date
            group by all
            order by host, state
        """,
        # A host that several deployments share is nobody's in particular.
        "GPU-hours and dollars by deployment and state, UTC days of the window": """
            with placed as (
                select host, if(count(distinct deployment) = 1, any_value(deployment), null) as deployment
                from stg_fleet_targets
                where host is not null
                group by host
            )
            select coalesce(deployment, 'several or none') as deployment, state, sum(gpu_hours) as gpu_hours,
                   if(count(usd) = count(*), sum(usd), null) as usd
            from fct_gpu_waste
            left join placed using (host)
            where day >= $since::date and day <= $until::date
            group by all
            order by all
        """,
        "What tokens cost, realized over the last 7 days": """
            select deployment, gpu_hours, usd_per_million_tokens, usd_per_million_prompt_tokens,
                   usd_per_million_generation_tokens, joules_per_generation_token
            from fct_deployment_costs
            where $since <= $until
            order by deployment
        """,
        "Goals as they are stated, and what says more": _STATED,
    }
)
