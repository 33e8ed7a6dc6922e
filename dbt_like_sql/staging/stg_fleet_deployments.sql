-- Deployments of the fleet as fleet.yaml describes them now, one row per deployment.
with

loads as (

    select * from raw_fleet_deployments

),

newest as (

    select *
    from loads
    where loaded_at = (select max(loaded_at) from loads)

)

select * from newest
