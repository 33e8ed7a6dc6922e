-- Hosts of the fleet as fleet.yaml describes them now, one row per host.
with

loads as (

    select * from raw_fleet_hosts

),

newest as (

    select *
    from loads
    where loaded_at = (select max(loaded_at) from loads)

)

select * from newest
