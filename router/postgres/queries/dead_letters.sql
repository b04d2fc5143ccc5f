-- name: list
SELECT id, phone_number, service, status, resolution, error_message, retry_count, attempts, next_retry_at,
       created_at, seq, message_id, correlation_id
  FROM webhook_dlq
 WHERE ($1::text IS NULL OR status = $1) AND ($2::text IS NULL OR service = $2)
 ORDER BY seq LIMIT $3;

-- name: ask_retry
-- What is being processed, or has been, is left alone.
UPDATE webhook_dlq SET status = 'pending', resolution = NULL, retry_requested_at = $1, updated_at = $1
 WHERE status IN ('pending', 'failed') AND ($2::uuid[] IS NULL OR id = ANY ($2))
   AND ($3::text IS NULL OR service = $3) AND ($4::text IS NULL OR status = $4)
RETURNING id;

-- name: wake
SELECT pg_notify('postroom_dead_letters', '');

-- name: claim
SELECT d.id, d.seq, d.service, d.revision FROM postroom_claim_dead_letters($1, $2, $3) d ORDER BY d.seq;
