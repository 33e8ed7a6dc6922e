-- Which configuration each engine rank ran and when, one row per target, engine rank and stretch.
with

changes as (

    select * from int_config_changes

),

ordered as (

    select
        *,
        lag(config_hash) over (partition by target, engine_rank order by changed_at) as hash_before

    from changes

),

stretches as (

    -- A first sight after an hour of silence is no change when the configuration is what it was.
    select
        target,
        engine_rank,
        engine,
        config_hash,
        changed_at as valid_from,
        lead(changed_at) over (partition by target, engine_rank order by changed_at) as valid_to

    from ordered

    where config_hash is distinct from hash_before

),

configs as (

    select * from stg_engine_configs

),

final as (

    select
        stretches.*,
        stretches.valid_to is null as is_current,
        configs.engine_version,
        configs.settings,
        dim_targets.deployment,
        dim_targets.host,
        dim_targets.source

    from stretches

    left join configs using (target, engine_rank, config_hash)

    left join dim_targets using (target)

)

select * from final
