-- Samples of families that fleet.yaml keeps, one row per target, name, labels and scrape.
with

kept_samples as (

    select * from raw_kept_samples

)

select * from kept_samples
