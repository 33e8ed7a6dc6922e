-- Histograms cumulative as scraped, one row per target, engine rank, metric and scrape.
with

engine_histograms as (

    select * from raw_engine_histograms

)

select * from engine_histograms
