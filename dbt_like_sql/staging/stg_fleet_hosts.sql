-- Hosts of the fleet as fleet.yaml describes them now, one row per host.
with

loads as (

    select * from raw_fleet_hosts

),

every_load as (

    -- One load writes one time into all three tables; a list that it found empty has no row to say so.
    select loaded_at from loads

    union all

    select loaded_at from raw_fleet_targets

    union all

    select loaded_at from raw_fleet_deployments

),

newest as (

    select *
    from loads
    where loaded_at = (select max(loaded_at) from every_load)

)

select * from newest
