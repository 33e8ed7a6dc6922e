-- How use develops by the hour and the day, one row per period, subject, name, signal and time.
with

gpu_hours as (

    select
        'gpu' as subject,
        host || '/' || gpu_uuid || case when mig_instance <> '' then '/' || mig_instance else '' end as name,
        hour_at,
        sample_count,
        unnest([
            {'signal': 'gpu_utilization_ratio', 'mean': gpu_utilization_mean_ratio, 'peak': gpu_utilization_max_ratio},
            {'signal': 'sm_active_ratio', 'mean': sm_active_mean_ratio, 'peak': sm_active_max_ratio},
            {'signal': 'dram_active_ratio', 'mean': dram_active_mean_ratio, 'peak': dram_active_max_ratio},
            {'signal': 'memory_used_bytes', 'mean': memory_used_mean_bytes, 'peak': memory_used_max_bytes},
            {'signal': 'power_watts', 'mean': power_mean_watts, 'peak': power_max_watts}
        ]) as reading

    from fct_gpu_utilization_1h

),

host_hours as (

    select
        'host' as subject,
        host as name,
        hour_at,
        sample_count,
        unnest([
            {'signal': 'cpu_busy_ratio', 'mean': cpu_busy_ratio, 'peak': null},
            {'signal': 'memory_used_ratio', 'mean': 1 - ratio(memory_available_mean_bytes, memory_total_bytes),
             'peak': memory_used_max_ratio}
        ]) as reading

    from fct_host_utilization_1h

),

replica_hours as (

    select
        'replica' as subject,
        target as name,
        hour_at,
        sample_count,
        unnest([
            {'signal': 'kv_cache_usage_ratio', 'mean': kv_cache_usage_mean_ratio, 'peak': kv_cache_usage_max_ratio},
            {'signal': 'requests_waiting', 'mean': requests_waiting_mean, 'peak': requests_waiting_max},
            {'signal': 'requests_per_second', 'mean': requests_per_second, 'peak': null},
            {'signal': 'generation_tokens_per_second', 'mean': generation_tokens_per_second, 'peak': null}
        ]) as reading

    from fct_replica_load_1h

),

hours as (

    select * from gpu_hours
    union all
    select * from host_hours
    union all
    select * from replica_hours

),

days as (

    select
        'day' as period,
        subject,
        name,
        reading.signal as signal,
        utc_step(86400, hour_at) as period_at,
        weighted_mean(reading.mean, sample_count) as mean_value,
        max(coalesce(reading.peak, reading.mean)) as max_value,
        sum(sample_count)::bigint as sample_count

    from hours

    group by subject, name, reading.signal, utc_step(86400, hour_at)

),

final as (

    select
        'hour' as period,
        subject,
        name,
        reading.signal as signal,
        hour_at as period_at,
        reading.mean as mean_value,
        reading.peak as max_value,
        sample_count

    from hours

    union all

    select * from days

)

select * from final
