-- name: unsent
SELECT id, session_key, phone_number_id, recipient, payload::text AS payload, correlation_id, created_at, attempts
  FROM postroom_unsent($1, $2, $3, $4);

-- name: next_due
-- When the next reply is due that waits for its time.
SELECT min(next_attempt_at) FROM whatsapp_outbox WHERE status = 'pending' AND next_attempt_at > $1;

-- name: record
SELECT postroom_record_sent($1, $2, $3, $4, $5, $6, $7);
