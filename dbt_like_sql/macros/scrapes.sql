-- The steps that counters of a metrics page grow over.

-- One successful scrape of the window with the successful scrape before it, one row per target and scrape.
-- previous_at is NULL at first sight: nothing is known of what happened before. It is also NULL when the page comes
-- from a process that was already running at the scrape before (two processes behind one address): their counters
-- cannot be compared. is_restart: the process started since the scrape before, so its counters count from zero.
-- An hour is how far back the scrape before is looked for; 60 s is how far a target's clock may lag ours.
create or replace macro scrape_steps(window_start, window_end) as table
    with

    scrapes as (

        select target, scraped_at, process_started_at
        from raw_scrapes
        where is_up and scraped_at >= window_start - interval 1 hour and scraped_at < window_end

    ),

    wanted as (

        select * from scrapes where scraped_at >= window_start

        union all

        select target, max(scraped_at), arg_max(process_started_at, scraped_at)
        from scrapes
        where scraped_at < window_start
        group by target

    ),

    paired as (

        select
            target,
            scraped_at,
            lag(scraped_at) over by_time as previous_at,
            process_started_at,
            lag(process_started_at) over by_time as previous_started_at

        from wanted

        window by_time as (partition by target order by scraped_at)

    ),

    judged as (

        select
            target,
            scraped_at,
            coalesce(
                abs(epoch(process_started_at) - epoch(previous_started_at)) > 1
                and process_started_at <= previous_at - interval 1 minute,
                false
            ) as is_other_process,
            case when not is_other_process then previous_at end as previous_at,
            coalesce(
                abs(epoch(process_started_at) - epoch(previous_started_at)) > 1 and not is_other_process,
                false
            ) as is_restart,
            process_started_at

        from paired

        where scraped_at >= window_start

    )

    select
        target,
        scraped_at,
        utc_step(60, scraped_at) as minute_at,
        previous_at,
        is_restart,
        is_other_process,
        epoch(scraped_at) - epoch(previous_at) as gap_seconds,
        process_started_at

    from judged;
