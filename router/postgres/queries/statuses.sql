-- name: subscribe
SELECT postroom_subscribe_statuses($1, $2);

-- name: due
SELECT * FROM postroom_due_statuses($1, $2, $3);

-- name: next_due
SELECT min(next_attempt_at) FROM status_deliveries WHERE service = $1 AND next_attempt_at > $2;

-- name: told
SELECT postroom_statuses_told($1, $2, $3, $4);
