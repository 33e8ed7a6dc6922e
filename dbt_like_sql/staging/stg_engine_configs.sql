-- Configurations seen, one row per target, engine rank and configuration.
with

engine_configs as (

    select * from raw_engine_configs

)

select * from engine_configs
