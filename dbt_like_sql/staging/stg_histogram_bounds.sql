-- Bucket bounds that histograms point to, one row per bounds_id.
with

histogram_bounds as (

    select * from raw_histogram_bounds

)

select * from histogram_bounds
