-- Changes of configuration, the first sight included, one row per target, engine rank and change.
with

samples as (

    -- The hour before the window tells what the configuration was before its first sample.
    select target, engine_rank, scraped_at, config_hash, engine
    from stg_engine_samples
    where
        scraped_at >= getvariable('window_start') - interval 1 hour
        and scraped_at < getvariable('window_end')
        and config_hash is not null

),

compared as (

    select
        *,
        lag(config_hash) over (partition by target, engine_rank order by scraped_at) as previous_config_hash

    from samples

),

changes as (

    select
        target,
        engine_rank,
        scraped_at as changed_at,
        engine,
        config_hash,
        previous_config_hash

    from compared

    where
        scraped_at >= getvariable('window_start')
        and config_hash is distinct from previous_config_hash

)

select * from changes
