-- What each histogram counted, one row per target, engine rank, metric, bounds and minute.
with

steps as (

    -- A minute more on both sides: it tells what a counter said last, and whether a fall lasts.
    select *
    from scrape_steps(getvariable('window_start') - interval 1 minute, getvariable('window_end') + interval 1 minute)

),

histograms as not materialized (

    -- An hour of lists: read by inner joins only, which skip what they do not need.
    select *
    from stg_engine_histograms
    where
        scraped_at >= getvariable('window_start') - interval 1 hour
        and scraped_at < getvariable('window_end') + interval 1 minute

),

scraped as (

    select
        now_is.* exclude (bucket_counts, sum_value),
        steps.* exclude (target, scraped_at, previous_at, process_started_at)

    from steps

    inner join histograms as now_is
        on now_is.target = steps.target and now_is.scraped_at = steps.scraped_at

),

placed as (

    select
        *,
        is_out_of_place(count_value, max(count_value) over minute_before, max(count_value) over minute_after)
            as is_out_of_place

    from scraped

    window
        by_life as (partition by target, engine_rank, metric, life order by scraped_at),
        minute_before as (by_life range between interval 1 minute preceding and interval 1 microsecond preceding),
        minute_after as (by_life range between interval 1 microsecond following and interval 1 minute following)

),

compared as (

    select
        *,
        lag(scraped_at) over by_life as previous_at,
        epoch(scraped_at) - epoch(
            coalesce(previous_at, case when is_restart then lag(scraped_at) over by_metric end)
        ) as gap_seconds,
        (previous_at is null and is_from_zero)
            or coalesce(count_value < lag(count_value) over by_life, false)
            or (previous_at is not null and bounds_id is distinct from lag(bounds_id) over by_life) as is_reset

    from placed

    where not is_out_of_place

    window
        by_metric as (partition by target, engine_rank, metric order by scraped_at),
        by_life as (partition by target, engine_rank, metric, life order by scraped_at)

),

cut as (

    -- A stretch ends at a reset; within one the last list less the first is all that was counted.
    select
        *,
        count(*) filter (is_reset or previous_at is null)
            over (partition by target, engine_rank, metric order by scraped_at rows unbounded preceding) as stretch

    from compared

),

stretches as (

    select
        target,
        engine_rank,
        metric,
        bounds_id,
        minute_at,
        stretch,
        max(scraped_at) as last_at,
        -- Counting goes from the scrape before; from zero after a reset; at first sight, from the first scrape.
        arg_min_null(
            case when not is_reset then coalesce(previous_at, scraped_at) end, scraped_at
        ) as from_at,
        arg_max(vantage, scraped_at) as vantage,
        arg_max(source_metric, scraped_at) as source_metric,
        arg_max(is_proxy, scraped_at) as is_proxy,
        count(*) as sample_count,
        sum(gap_seconds) as observed_seconds,
        max(gap_seconds) as gap_seconds

    from cut

    where minute_at >= getvariable('window_start') and minute_at < getvariable('window_end')

    group by target, engine_rank, metric, bounds_id, minute_at, stretch

    -- A first sight alone has counted nothing that is known.
    having bool_or(previous_at is not null or is_reset)

),

started as (

    select
        stretches.target,
        stretches.engine_rank,
        stretches.metric,
        stretches.from_at,
        histograms.count_value,
        histograms.sum_value,
        histograms.bucket_counts

    from stretches

    inner join histograms
        on
            histograms.target = stretches.target
            and histograms.scraped_at = stretches.from_at
            and histograms.engine_rank = stretches.engine_rank
            and histograms.metric = stretches.metric

),

counted as (

    select
        stretches.*,
        last_is.count_value - coalesce(from_is.count_value, 0) as count_increment,
        last_is.sum_value - coalesce(from_is.sum_value, 0) as sum_increment,
        last_is.bucket_counts,
        case
            when from_is.bucket_counts is null then last_is.bucket_counts
            else list_transform(list_zip(last_is.bucket_counts, from_is.bucket_counts), lambda p_: p_[1] - p_[2])
        end as bucket_growth,
        last_is.count_value as count_last,
        last_is.sum_value as sum_last

    from stretches

    inner join histograms as last_is
        on
            last_is.target = stretches.target
            and last_is.scraped_at = stretches.last_at
            and last_is.engine_rank = stretches.engine_rank
            and last_is.metric = stretches.metric

    left join started as from_is
        on
            from_is.target = stretches.target
            and from_is.from_at = stretches.from_at
            and from_is.engine_rank = stretches.engine_rank
            and from_is.metric = stretches.metric

),

judged as (

    -- A bucket that fell although the count did not is a reset the count outran: all there is has come since.
    select
        *,
        count_increment < 0 or coalesce(list_min(bucket_growth) < 0, false) as is_outrun

    from counted

),

minutes as (

    select
        target,
        engine_rank,
        metric,
        bounds_id,
        minute_at,
        arg_max(vantage, last_at) as vantage,
        arg_max(source_metric, last_at) as source_metric,
        arg_max(is_proxy, last_at) as is_proxy,
        sum(sample_count)::bigint as sample_count,
        sum(observed_seconds) as observed_seconds,
        max(gap_seconds) as gap_seconds,
        sum(case when is_outrun then count_last else count_increment end) as observation_count,
        sum(case when is_outrun then sum_last else sum_increment end) as observation_sum,
        histogram_merge(list(case when is_outrun then bucket_counts else bucket_growth end)) as bucket_increments

    from judged

    group by target, engine_rank, metric, bounds_id, minute_at

)

select * from minutes
