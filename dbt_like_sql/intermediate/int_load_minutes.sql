-- What each deployment was asked for and what answered, one row per deployment and minute.
with

scrapes as (

    select *
    from int_scrape_minutes
    where
        minute_at >= getvariable('window_start')
        and minute_at < getvariable('window_end')
        and deployment is not null

),

engines as (

    -- One minute more than the window, so that a change of the queue has the minute before it to compare with.
    select *
    from int_engine_minutes
    where
        minute_at >= getvariable('window_start') - interval 1 minute
        and minute_at < getvariable('window_end')
        and vantage in ('engine', 'frontend')

),

ranks as (

    select
        *,
        case
            when lag(minute_at) over by_rank = minute_at - interval 1 minute and restart_count = 0
                then requests_waiting_last - lag(requests_waiting_last) over by_rank
        end as waiting_growth,
        case
            when lag(minute_at) over by_rank = minute_at - interval 1 minute and restart_count = 0
                then requests_running_last - lag(requests_running_last) over by_rank
        end as running_growth,
        coalesce(realtime_tokens, generation_tokens) as output_tokens

    from engines

    window by_rank as (partition by target, engine_rank order by minute_at)

),

arrivals as (

    -- Where arrivals are not counted, what came is what ended and what is now in execution or waiting and was not
    -- before. The case keeps unknown unknown: greatest() passes over NULL.
    select
        *,
        requests_finished + coalesce(requests_aborted, 0) + coalesce(requests_failed, 0)
        + coalesce(waiting_growth, 0) + coalesce(running_growth, 0) as net,
        case when net is not null then greatest(0, net) end as came

    from ranks

    where minute_at >= getvariable('window_start')

),

replicas as (

    -- Ranks of one replica work side by side: what they did adds up, their time does not.
    select
        target,
        minute_at,
        any_value(vantage) as vantage,
        max(observed_seconds) as seconds,
        sum(coalesce(requests_started, came)) as requests,
        sum(requests_finished) as finished,
        sum(prompt_tokens) as prompt_tokens,
        sum(output_tokens) as output_tokens,
        sum(waiting_growth) as waiting_growth,
        sum(requests_running_mean) as requests_running_mean,
        sum(requests_waiting_last) as requests_waiting_last

    from arrivals

    group by target, minute_at

),

sides as (

    select
        scrapes.deployment,
        replicas.minute_at,
        replicas.vantage,
        sum(ratio(requests, seconds)) as requests_per_second,
        sum(ratio(finished, seconds)) as finished_per_second,
        sum(ratio(prompt_tokens, seconds)) as prompt_tokens_per_second,
        sum(ratio(output_tokens, seconds)) as generation_tokens_per_second,
        sum(ratio(waiting_growth, seconds)) as waiting_growth_per_second,
        sum(requests_running_mean) as requests_running_mean,
        sum(requests_waiting_last) as requests_waiting_last

    from replicas

    inner join scrapes using (target, minute_at)

    group by all

),

loads as (

    -- Seen by a frontend and by its engines, a request is one request: arrivals are best known at the frontend,
    -- tokens, queues and what runs at the engines.
    select
        deployment,
        minute_at,
        coalesce(front.requests_per_second, inner_side.requests_per_second) as requests_per_second,
        coalesce(inner_side.finished_per_second, front.finished_per_second) as finished_per_second,
        coalesce(inner_side.prompt_tokens_per_second, front.prompt_tokens_per_second) as prompt_tokens_per_second,
        coalesce(inner_side.generation_tokens_per_second, front.generation_tokens_per_second)
            as generation_tokens_per_second,
        coalesce(inner_side.waiting_growth_per_second, front.waiting_growth_per_second) as waiting_growth_per_second,
        coalesce(inner_side.requests_running_mean, front.requests_running_mean) as requests_running_mean,
        coalesce(inner_side.requests_waiting_last, front.requests_waiting_last) as requests_waiting_last

    from (select * from sides where vantage = 'engine') as inner_side

    full join (select * from sides where vantage = 'frontend') as front using (deployment, minute_at)

),

targets as (

    select
        deployment,
        minute_at,
        arg_max(source, last_scraped_at) as source,
        count(*) as target_count,
        count(*) filter (is_up_last and vantage = 'engine') as replica_count,
        count(*) filter (not is_up_last) as down_count

    from scrapes

    group by deployment, minute_at

),

answered as (

    -- Work that came: what was served, and what joined the queue at the tokens a request of this minute had.
    select
        targets.*,
        loads.* exclude (deployment, minute_at),
        loads.prompt_tokens_per_second + loads.generation_tokens_per_second as served,
        served + coalesce(loads.waiting_growth_per_second * ratio(served, loads.finished_per_second), 0) as came

    from targets

    left join loads using (deployment, minute_at)

),

minutes as (

    select
        * exclude (served, came, finished_per_second, waiting_growth_per_second),
        case when came is not null then greatest(0, came) end as demand_tokens_per_second

    from answered

)

select * from minutes
