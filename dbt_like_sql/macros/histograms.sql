-- Quantiles and shares of classic histograms, equal to Prometheus 3.
-- `upper_bounds` and `cumulative` are lists of the same length: the bucket bounds with +Inf, and the cumulative counts
-- (or rates, or increments). Order does not matter; a bucket whose bound or count is NULL is left out.
-- Lambda parameters end in _ because a column or table of the caller with the same name would win over them.

-- Buckets by bound, equal bounds added up: [{'le': bound, 'n': cumulative count}].
create or replace macro histogram_buckets(upper_bounds, cumulative) as
    list_transform(
        [list_sort(list_filter(
            list_transform(list_zip(upper_bounds, cumulative), lambda p_: {'le': p_[1]::double, 'n': p_[2]::double}),
            lambda b_: b_.le is not null and b_.n is not null and not isnan(b_.le)
        ))],
        lambda bs_: case
            when len(list_distinct(list_transform(bs_, lambda b_: b_.le))) = len(bs_) then bs_
            else list_transform(
                list_sort(list_distinct(list_transform(bs_, lambda b_: b_.le))),
                lambda le_: {
                    'le': le_,
                    'n': list_sum(list_transform(list_filter(bs_, lambda b_: b_.le = le_), lambda b_: b_.n))
                }
            )
        end
    )[1];

-- Counts that never fall. A relative difference below 1e-12 is rounding and is dropped; a real decrease is raised to
-- the bucket before. The walk is quadratic, so it is taken only where a pair of neighbors needs it.
create or replace macro histogram_monotone(counts) as
    list_transform(
        [counts],
        lambda ns_: case
            when coalesce(list_bool_and(list_transform(
                list_zip(ns_[1:-2], ns_[2:]),
                lambda p_: p_[2] = p_[1]
                    or (p_[2] > p_[1] and (p_[2] - p_[1]) / (abs(p_[1]) + abs(p_[2])) >= 1e-12)
            )), true) then ns_
            else list_reduce(
                list_transform(ns_, lambda v_: [v_]),
                lambda a_, c_: list_append(a_, case
                    when c_[1] < a_[-1] then a_[-1]
                    when c_[1] = a_[-1] then c_[1]
                    when (c_[1] - a_[-1]) / (abs(c_[1]) + abs(a_[-1])) < 1e-12 then a_[-1]
                    else c_[1]
                end)
            )
        end
    )[1];

-- {'edges': ascending bounds, 'counts': monotone cumulative counts}, or NULL where PromQL answers NaN whatever the
-- quantile: no +Inf bucket, fewer than two buckets, or nothing observed.
create or replace macro histogram_repaired(upper_bounds, cumulative) as
    list_transform(
        list_transform(
            [histogram_buckets(upper_bounds, cumulative)],
            lambda b_: {
                'edges': list_transform(b_, lambda x_: x_.le),
                'counts': histogram_monotone(list_transform(b_, lambda x_: x_.n))
            }
        ),
        lambda h_: case
            when len(h_.edges) >= 2 and h_.edges[-1] = 'inf'::double and h_.counts[-1] <> 0 then h_
        end
    )[1];

-- Place (1 is the first bucket) of the bucket that holds the observation of this rank.
create or replace macro histogram_place(counts, rank) as
    len(list_filter(counts[1:-2], lambda n_: n_ < rank)) + 1;

create or replace macro histogram_lower_edge(edges, place) as
    case when place > 1 then edges[place - 1] when edges[1] > 0 then 0::double else '-inf'::double end;

-- The quantile of a histogram that `histogram_repaired` made; several quantiles of one histogram repair it once.
create or replace macro repaired_quantile(q, repaired) as
    list_transform(
        list_transform(
            [{'q': q::double, 'h': repaired}],
            lambda k_: {
                'q': k_.q,
                'edges': k_.h.edges,
                'counts': k_.h.counts,
                'rank': k_.q * k_.h.counts[-1],
                'place': histogram_place(k_.h.counts, k_.q * k_.h.counts[-1])
            }
        ),
        lambda k_: case
            when k_.q is null then null
            when isnan(k_.q) then 'nan'::double
            when k_.q < 0 then '-inf'::double
            when k_.q > 1 then 'inf'::double
            when k_.edges is null then 'nan'::double
            when k_.place = len(k_.edges) then k_.edges[-2]
            when k_.place = 1 and k_.edges[1] <= 0 then k_.edges[1]
            when k_.place = 1 and k_.counts[1] = 0 then 'nan'::double
            when k_.place = 1 then k_.edges[1] * (k_.rank / k_.counts[1])
            else k_.edges[k_.place - 1] + (k_.edges[k_.place] - k_.edges[k_.place - 1])
                * ((k_.rank - k_.counts[k_.place - 1]) / (k_.counts[k_.place] - k_.counts[k_.place - 1]))
        end
    )[1];

-- PromQL's histogram_quantile.
create or replace macro histogram_quantile(q, upper_bounds, cumulative) as
    repaired_quantile(q, histogram_repaired(upper_bounds, cumulative));

-- The edges of the bucket that holds the quantile: all that the histogram really says about it. NULL where there is
-- no such bucket; the upper edge of the last bucket is +Inf.
create or replace macro histogram_quantile_lower(q, upper_bounds, cumulative) as
    list_transform(
        [{'q': q::double, 'h': histogram_repaired(upper_bounds, cumulative)}],
        lambda k_: case when k_.q between 0 and 1 and k_.h is not null then
            histogram_lower_edge(k_.h.edges, histogram_place(k_.h.counts, k_.q * k_.h.counts[-1]))
        end
    )[1];

create or replace macro histogram_quantile_upper(q, upper_bounds, cumulative) as
    list_transform(
        [{'q': q::double, 'h': histogram_repaired(upper_bounds, cumulative)}],
        lambda k_: case when k_.q between 0 and 1 and k_.h is not null then
            k_.h.edges[histogram_place(k_.h.counts, k_.q * k_.h.counts[-1])]
        end
    )[1];

-- {'lower', 'upper'} that hold the sample quantile of whole observations under every usual definition (nearest rank
-- or interpolated: Hyndman and Fan 1996, types 1 to 9). For increments, not for rates: ranks are counted.
create or replace macro repaired_interval(q, repaired) as
    list_transform(
        [{'q': q::double, 'h': repaired}],
        lambda k_: case when k_.q between 0 and 1 and k_.h is not null then {
            'lower': histogram_lower_edge(
                k_.h.edges,
                histogram_place(k_.h.counts, greatest(1, floor(k_.q * k_.h.counts[-1])))
            ),
            'upper': k_.h.edges[
                histogram_place(k_.h.counts, least(k_.h.counts[-1], ceil(greatest(
                    k_.q * (k_.h.counts[-1] + 1),
                    k_.q * (k_.h.counts[-1] - 1) + 1
                ))))
            ]
        } end
    )[1];

create or replace macro histogram_quantile_interval(q, upper_bounds, cumulative) as
    repaired_interval(q, histogram_repaired(upper_bounds, cumulative));

-- What tables tell of a histogram that `histogram_repaired` made, as one struct to unnest into columns. A quantile is
-- known no better than its bucket: lower and upper hold it whatever the definition.
create or replace macro repaired_summary(repaired) as
    {
        'p50_value': known(repaired_quantile(0.5, repaired)),
        'p50_lower': repaired_interval(0.5, repaired).lower,
        'p50_upper': repaired_interval(0.5, repaired).upper,
        'p95_value': known(repaired_quantile(0.95, repaired)),
        'p95_lower': repaired_interval(0.95, repaired).lower,
        'p95_upper': repaired_interval(0.95, repaired).upper,
        'p99_value': known(repaired_quantile(0.99, repaired)),
        'p99_lower': repaired_interval(0.99, repaired).lower,
        'p99_upper': repaired_interval(0.99, repaired).upper
    };

-- Share of observations at or under a bound, exact because only bucket edges are answered: NULL for any other bound.
create or replace macro histogram_share_at_or_under(bound, upper_bounds, cumulative) as
    list_transform(
        [{'bound': bound::double, 'h': histogram_repaired(upper_bounds, cumulative)}],
        lambda k_: list_filter(
            list_zip(k_.h.edges, k_.h.counts),
            lambda p_: p_[1] = k_.bound or abs(p_[1] - k_.bound) <= 1e-9 * abs(k_.bound)
        )[1][2] / k_.h.counts[-1]
    )[1];

-- Cumulative count below a value, linear inside a bucket; a bucket without a finite width is not divided.
create or replace macro histogram_rank(value, edges, counts) as
    list_transform(
        list_transform(
            [{'v': value, 'edges': edges, 'counts': counts}],
            lambda k_: {
                'v': k_.v,
                'edges': k_.edges,
                'counts': k_.counts,
                'place': len(list_filter(k_.edges, lambda e_: e_ <= k_.v)) + 1
            }
        ),
        lambda r_: case
            when r_.v <= histogram_lower_edge(r_.edges, 1) then 0
            when r_.place > len(r_.edges) then r_.counts[-1]
            when histogram_lower_edge(r_.edges, r_.place) = '-inf'::double then r_.counts[1]
            else least(r_.counts[-1], coalesce(r_.counts[nullif(r_.place - 1, 0)], 0)
                + case when r_.edges[r_.place] = 'inf'::double then 0 else
                    (r_.counts[r_.place] - coalesce(r_.counts[nullif(r_.place - 1, 0)], 0))
                    * (r_.v - histogram_lower_edge(r_.edges, r_.place))
                    / (r_.edges[r_.place] - histogram_lower_edge(r_.edges, r_.place))
                end)
        end
    )[1];

-- PromQL's histogram_fraction: share of observations between two values, interpolated inside a bucket.
create or replace macro histogram_fraction(low, high, upper_bounds, cumulative) as
    list_transform(
        [{'low': low::double, 'high': high::double, 'b': histogram_buckets(upper_bounds, cumulative)}],
        lambda k_: case
            when isnan(k_.low) or isnan(k_.high) then 'nan'::double
            when k_.b[-1].le is distinct from 'inf'::double or k_.b[-1].n = 0 then 'nan'::double
            when k_.low >= k_.high then 0
            else (
                histogram_rank(k_.high, list_transform(k_.b, lambda x_: x_.le), list_transform(k_.b, lambda x_: x_.n))
                - histogram_rank(k_.low, list_transform(k_.b, lambda x_: x_.le), list_transform(k_.b, lambda x_: x_.n))
            ) / k_.b[-1].n
        end
    )[1];

-- Element-wise sum of lists of one length: histogram_merge(list(bucket_increments)), grouped by bounds_id. NULL lists
-- are left out; NULL when nothing remains.
create or replace macro histogram_merge(lists) as
    list_transform(
        [list_filter(lists, lambda x_: x_ is not null)],
        lambda ls_: case when len(ls_) > 0 then list_reduce(
            ls_,
            lambda t_, x_: list_transform(list_zip(t_, x_), lambda p_: p_[1] + p_[2])
        ) end
    )[1];
