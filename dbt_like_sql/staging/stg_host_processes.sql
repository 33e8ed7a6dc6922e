-- Engine processes, one row per host, process and tick.
with

host_processes as (

    select * from raw_host_processes

)

select * from host_processes
