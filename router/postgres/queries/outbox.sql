-- name: unsent
SELECT id, session_key, phone_number_id, recipient, payload::text AS payload, correlation_id, created_at, attempts
  FROM postroom_unsent($1, $2, $3, $4);

-- name: next_due
-- When the next reply is due that waits for its time.
SELECT min(next_attempt_at) FROM whatsapp_outbox WHERE status = 'pending' AND next_attempt_at > $1;

-- name: record
SELECT postroom_record_sent($1, $2, $3, $4, $5, $6, $7);

-- name: send
SELECT id, created, is_same, status FROM postroom_send($1, $2, $3, $4, $5, $6, $7, $8);

-- name: sent
-- A message of that service, and the furthest status that the channel gave it.
SELECT o.id, o.status, o.message_id, o.error_message, o.attempts, o.created_at, s.status AS furthest
  FROM whatsapp_outbox o
  LEFT JOIN whatsapp_statuses s ON s.phone_number_id = o.phone_number_id AND s.message_id = o.message_id
 WHERE o.service = $1 AND o.id = $2;
