-- Growth of a counter between two samples, and the grid that minutes and hours lie on.

-- What a counter grew by since the sample before. NULL when either is unknown; a counter that fell was reset and
-- has counted its new value since.
create or replace macro counter_increase(before, now_is) as
    case when now_is < before then now_is else now_is - before end;

-- The same within one life of the process behind the counter. A life that was seen to begin counts from zero.
create or replace macro counter_step(before, now_is, is_from_zero) as
    case when before is null and is_from_zero then now_is else counter_increase(before, now_is) end;

-- Whether a reading lies between higher ones: a clock set back put it there, among readings taken after it. What it
-- counted is in theirs. A reset stays low, so it is none; one that regains its height within a minute is lost here,
-- which is less than it would be to count such a reading as a reset.
create or replace macro is_out_of_place(now_is, highest_before, highest_after) as
    coalesce(now_is < highest_before and highest_after >= highest_before, false);

-- Start of the UTC step of so many seconds that holds a moment, whatever the session's time zone.
create or replace macro utc_step(step_seconds, moment) as
    make_timestamptz(epoch_us(moment) // (step_seconds * 1000000::bigint) * (step_seconds * 1000000::bigint));

-- A division that knows nothing when there is nothing to divide by.
create or replace macro ratio(part, whole) as
    case when whole > 0 then part / whole end;

-- NaN is how PromQL says "no observations"; in tables that is NULL.
create or replace macro known(value) as
    case when not isnan(value) then value end;

-- Mean of values, each with its weight; what is unknown weighs nothing.
create or replace macro weighted_mean(value, weight) as
    sum(value * weight) / nullif(sum(case when value is not null then weight end), 0);
