-- Attempts to read the GPUs of a host, one row per host and tick.
with

gpu_collections as (

    select * from raw_gpu_collections

)

select * from gpu_collections
