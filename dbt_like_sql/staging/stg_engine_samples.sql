-- Normalized scalars with impossible ratios left out, one row per target, engine rank and scrape.
with

engine_samples as (

    select * from raw_engine_samples

),

possible as (

    -- Engines print -1 for "off" and NaN before the first request; neither is a share of anything.
    select * replace (
        case when kv_cache_usage_ratio between 0 and 1 then kv_cache_usage_ratio end as kv_cache_usage_ratio,
        case when kv_cache_host_usage_ratio between 0 and 1 then kv_cache_host_usage_ratio end
            as kv_cache_host_usage_ratio,
        case when kv_cache_reserved_ratio between 0 and 1 then kv_cache_reserved_ratio end as kv_cache_reserved_ratio,
        case when prefix_cache_hit_ratio between 0 and 1 then prefix_cache_hit_ratio end as prefix_cache_hit_ratio
    )

    from engine_samples

)

select * from possible
