-- rate, increase and delta over a range, equal to Prometheus 3: left-open ranges (start, end], extrapolation to the
-- edges, counter resets, and no extrapolation of a counter below zero.
-- Call: promql_rate(list(scraped_at), list(value), window_start, window_end), grouped by series. Samples outside the
-- window and NULL values are left out here, order does not matter; NULL when fewer than two samples remain.
-- Lambda parameters end in _ because a column or table of the caller with the same name would win over them.

-- The samples of one series inside (window_start, window_end], by time: [{'t': microseconds, 'v': value}].
create or replace macro promql_samples(times, vals, window_start, window_end) as
    list_transform(
        [{'zipped': list_zip(times, vals), 'after': epoch_us(window_start), 'upto': epoch_us(window_end)}],
        lambda w_: list_sort(list_filter(
            list_transform(w_.zipped, lambda p_: {'t': epoch_us(p_[1]), 'v': p_[2]::double}),
            lambda s_: s_.v is not null and s_.t > w_.after and s_.t <= w_.upto
        ))
    )[1];

-- What a counter lost in resets: the value before each decrease. NaN is neither more nor less than any number in
-- PromQL; DuckDB sorts it above all, so that a sample after a NaN must not look like a reset.
create or replace macro promql_lost_in_resets(samples) as
    coalesce(list_sum(list_transform(
        list_zip(samples[1:-2], samples[2:]),
        lambda p_: case when p_[2].v < p_[1].v and not isnan(p_[1].v) then p_[1].v else 0 end
    )), 0);

-- Growth over the window, carried to the window's edges as far as the rules let it.
create or replace macro promql_extrapolated(samples, window_start, window_end, is_counter) as
    list_transform(
        list_transform(
            [{
                'seen': samples,
                'starts': epoch_us(window_start),
                'ends': epoch_us(window_end),
                'counter': is_counter
            }],
            lambda w_: case when len(w_.seen) < 2 then null else {
                'first': w_.seen[1].v,
                'growth': w_.seen[-1].v - w_.seen[1].v
                    + case when w_.counter then promql_lost_in_resets(w_.seen) else 0 end,
                'sampled': (w_.seen[-1].t - w_.seen[1].t)::double,
                'spacing': (w_.seen[-1].t - w_.seen[1].t)::double / (len(w_.seen) - 1),
                'to_start': (w_.seen[1].t - w_.starts)::double,
                'to_end': (w_.ends - w_.seen[-1].t)::double,
                'counter': w_.counter
            } end
        ),
        -- An edge farther away than 1.1 of the mean spacing is taken as half a spacing away.
        lambda g_: case when g_ is null then null when g_.sampled = 0 then g_.growth else g_.growth * (
            g_.sampled
            + least(
                case when g_.to_start >= g_.spacing * 1.1 then g_.spacing / 2 else g_.to_start end,
                case when g_.counter and g_.growth > 0 and g_.first >= 0
                    then g_.sampled * (g_.first / g_.growth) else 'inf'::double end
            )
            + case when g_.to_end >= g_.spacing * 1.1 then g_.spacing / 2 else g_.to_end end
        ) / g_.sampled end
    )[1];

create or replace macro promql_increase(times, vals, window_start, window_end) as
    promql_extrapolated(promql_samples(times, vals, window_start, window_end), window_start, window_end, true);

create or replace macro promql_rate(times, vals, window_start, window_end) as
    promql_increase(times, vals, window_start, window_end)
    / ((epoch_us(window_end) - epoch_us(window_start)) / 1e6);

create or replace macro promql_delta(times, vals, window_start, window_end) as
    promql_extrapolated(promql_samples(times, vals, window_start, window_end), window_start, window_end, false);
