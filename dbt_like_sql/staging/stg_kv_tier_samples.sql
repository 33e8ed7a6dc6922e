-- KV-cache tiers, one row per target, tier and scrape.
with

kv_tier_samples as (

    select * from raw_kv_tier_samples

)

select * from kv_tier_samples
