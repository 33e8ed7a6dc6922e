-- GPUs, one row per host, GPU, MIG instance and tick.
with

gpu_samples as (

    select * from raw_gpu_samples

)

select * from gpu_samples
