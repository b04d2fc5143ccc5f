-- name: hold_session_lock
-- Only a hint: it is free as soon as the holder's database session has ended, before the lease runs out.
SELECT pg_try_advisory_lock(7305, 4);

-- name: release_session_lock
-- It is the holder's, who asks for it with each renewal.
SELECT pg_advisory_unlock(7305, 4);

-- name: take
SELECT postroom_take_lease($1, $2, $3);

-- name: renew
SELECT postroom_renew_lease($1, $2, $3);

-- name: end
SELECT postroom_end_lease($1);
