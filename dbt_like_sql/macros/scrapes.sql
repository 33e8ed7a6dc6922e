-- The steps that counters of a metrics page grow over.

-- One successful scrape of the window with the successful scrape before it, one row per target and scrape, and the
-- last scrape before the window, which has none before it here.
-- previous_at is NULL at first sight: nothing is known of what happened before. It is also NULL when the page comes
-- from a process that was already running at the scrape before (two processes behind one address, or scrapes that a
-- clock set back put among others): their counters cannot be compared. is_restart: the process started since the
-- scrape before, so its counters count from zero. life: scrapes of a target that can be compared with each other have
-- the same; is_from_zero: its beginning was a restart.
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
            lag(process_started_at) over by_time as previous_started_at,
            max(process_started_at) over (by_time rows between unbounded preceding and 1 preceding)
                as newest_started_at

        from wanted

        window by_time as (partition by target order by scraped_at)

    ),

    judged as (

        -- A start that is not the newest seen is no news.
        select
            target,
            scraped_at,
            coalesce(abs(epoch(process_started_at) - epoch(previous_started_at)) > 1, false) as is_changed,
            is_changed
            and (
                process_started_at <= previous_at - interval 1 minute
                or epoch(process_started_at) - epoch(newest_started_at) <= 1
            ) as is_other_process,
            case when not is_other_process then previous_at end as previous_at,
            is_changed and not is_other_process as is_restart,
            process_started_at

        from paired

    ),

    lives as (

        select
            *,
            count(*) filter (is_restart or is_other_process)
                over (partition by target order by scraped_at rows unbounded preceding) as life

        from judged

    )

    select
        target,
        scraped_at,
        utc_step(60, scraped_at) as minute_at,
        previous_at,
        is_restart,
        is_other_process,
        life,
        bool_or(is_restart) over (partition by target, life) as is_from_zero,
        process_started_at

    from lives;
