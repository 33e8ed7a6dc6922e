-- When a replica's process was first seen, first read and first done with a request, one row per target and event.
with

scrapes as (

    -- The hour before the window tells whether a target is new.
    select target, scraped_at, deployment, is_up
    from stg_scrapes
    where
        scraped_at >= getvariable('window_start') - interval 1 hour
        and scraped_at < getvariable('window_end')

),

compared as (

    select
        *,
        lag(scraped_at) over (partition by target order by scraped_at) as before_at

    from scrapes

),

steps as (

    select *
    from scrape_steps(getvariable('window_start'), getvariable('window_end'))
    where scraped_at >= getvariable('window_start')

),

finished as (

    select
        target,
        scraped_at,
        sum(coalesce(requests_finished_total, generation_tokens_total)) as finished_total

    from stg_engine_samples

    where
        scraped_at >= getvariable('window_start') - interval 1 hour
        and scraped_at < getvariable('window_end')
        and vantage = 'engine'

    group by target, scraped_at

),

ends as (

    select
        steps.*,
        now_is.finished_total,
        before.finished_total as finished_before

    from steps

    inner join finished as now_is
        on now_is.target = steps.target and now_is.scraped_at = steps.scraped_at

    left join finished as before
        on before.target = steps.target and before.scraped_at = steps.previous_at

),

events as (

    select target, scraped_at as happened_at, 'first_attempt' as event, null::timestamptz as process_started_at
    from compared
    where before_at is null and scraped_at >= getvariable('window_start')

    union all

    -- Of a new process: it was not there at the scrape before, or it has not been counting yet.
    select target, scraped_at, 'first_page', process_started_at
    from steps
    where is_restart or (previous_at is null and not is_other_process)

    union all

    -- A first page that already counts requests belongs to a process that nobody saw start.
    select target, scraped_at, if(previous_at is null, 'already_serving', 'first_completion'), process_started_at
    from ends
    where finished_total > 0 and (previous_at is null or is_restart or finished_before = 0)

),

starts as (

    select
        events.*,
        compared.deployment

    from events

    left join compared
        on compared.target = events.target and compared.scraped_at = events.happened_at

)

select * from starts
