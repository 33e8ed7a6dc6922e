-- Disks, networks and file systems, one row per host, kind, device and tick.
with

host_devices as (

    select * from raw_host_devices

)

select * from host_devices
