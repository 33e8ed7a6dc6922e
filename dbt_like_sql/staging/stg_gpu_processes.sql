-- Processes on GPUs, one row per host, GPU, process and tick.
with

gpu_processes as (

    select * from raw_gpu_processes

)

select * from gpu_processes
