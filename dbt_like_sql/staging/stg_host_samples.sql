-- Hosts, one row per host and tick.
with

host_samples as (

    select * from raw_host_samples

)

select * from host_samples
