-- What each KV-cache tier was asked for and found, one row per target, tier and five minutes.
with

loads as (

    select *
    from fct_replica_load_5m
    where period_at >= getvariable('window_start') and period_at < getvariable('window_end')

),

tiers as (

    select *, utc_step(300, minute_at) as period_at
    from int_kv_tier_minutes
    where minute_at >= getvariable('window_start') and minute_at < getvariable('window_end')

),

engine_tiers as (

    -- Engines that count only what they found were asked for the whole prompt.
    select
        target,
        period_at,
        unnest([
            {
                'tier': 'device',
                'queried': coalesce(prefix_cache_queries, prompt_tokens),
                'hit': coalesce(prefix_cache_hits, cached_tokens_device)
            },
            {'tier': 'external', 'queried': external_cache_queries, 'hit': external_cache_hits},
            {'tier': 'host', 'queried': prompt_tokens, 'hit': cached_tokens_host},
            {'tier': 'storage', 'queried': prompt_tokens, 'hit': cached_tokens_storage},
            {'tier': 'remote', 'queried': prompt_tokens, 'hit': cached_tokens_remote}
        ]) as looked_up,
        kv_cache_usage_mean_ratio,
        kv_cache_usage_max_ratio,
        kv_cache_capacity_tokens

    from loads

),

engine_rows as (

    select
        target,
        looked_up.tier as tier,
        period_at,
        looked_up.queried as queried_tokens,
        looked_up.hit as hit_tokens,
        case when tier = 'device' then kv_cache_usage_mean_ratio end as usage_mean_ratio,
        case when tier = 'device' then kv_cache_usage_max_ratio end as usage_max_ratio,
        case when tier = 'device' then kv_cache_capacity_tokens end as capacity_tokens,
        null::double as used_bytes,
        null::double as capacity_bytes,
        null::double as evicted_chunks

    from engine_tiers

    where looked_up.hit is not null or (tier = 'device' and kv_cache_usage_mean_ratio is not null)

),

cache_rows as (

    select
        target,
        tier,
        period_at,
        sum(requested_tokens) as queried_tokens,
        sum(hit_tokens) as hit_tokens,
        weighted_mean(usage_max_ratio, sample_count) as usage_mean_ratio,
        max(usage_max_ratio) as usage_max_ratio,
        null::double as capacity_tokens,
        arg_max(used_bytes, minute_at) as used_bytes,
        arg_max(capacity_bytes, minute_at) as capacity_bytes,
        sum(evicted_chunks) as evicted_chunks

    from tiers

    group by target, tier, period_at

),

final as (

    select *, ratio(hit_tokens, queried_tokens) as hit_ratio from engine_rows

    union all

    select *, ratio(hit_tokens, queried_tokens) as hit_ratio from cache_rows

)

select * from final
