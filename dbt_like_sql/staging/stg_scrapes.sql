-- One read of one target, successful or not, one row per target and scrape.
with

scrapes as (

    select * from raw_scrapes

)

select * from scrapes
