-- name: known_by
SELECT name, session_key, phone_number_id FROM session_names WHERE name = ANY ($1::text[]) OR session_key = ANY ($2::text[]);

-- name: hold_archives
-- No archive is begun while this session is there.
SELECT pg_advisory_lock(7305, 6);

-- name: unfinished_archives
SELECT name FROM postroom_archives WHERE state <> 'archived' ORDER BY name;

-- name: bury
SELECT postroom_bury($1, $2);

-- name: marks
SELECT next_event, next_seq FROM journal_head WHERE shard = 0;

-- name: events
-- Bodies that may mention the person: that hold a name ($3), or escapes ($4) behind which one may be. All of them are
-- read, so it is written out, which is twice as fast as a function.
SELECT event_id FROM wa_events
 WHERE event_id >= $1 AND event_id < $2
   AND (EXISTS (SELECT FROM unnest($3::bytea[]) AS n (needle) WHERE position(n.needle IN body) > 0)
        OR (position('\x5c753030'::bytea IN body) > 0  -- \u00
            AND EXISTS (SELECT FROM unnest($4::bytea[]) AS n (needle) WHERE position(n.needle IN body) > 0)))
 ORDER BY event_id;

-- name: items
SELECT seq, received_at, event_id, path FROM whatsapp_messages_items
 WHERE event_id = ANY ($1::bigint[]) AND bucket IS DISTINCT FROM 'erased' ORDER BY seq;

-- name: bodies
SELECT event_id, received_at, body FROM wa_events WHERE event_id = ANY ($1::bigint[]) ORDER BY event_id;

-- name: erase_items
SELECT postroom_erase_items($1, $2, $3, $4, $5);

-- name: erase_archived
SELECT postroom_erase_archived($1, $2, $3, $4, $5);

-- name: replies
SELECT id, phone_number_id, message_id, payload::text AS payload, error_message,
       session_key = ANY ($1::text[]) OR coalesce(recipient = ANY ($2::text[]), false) AS own
  FROM whatsapp_outbox
 WHERE session_key = ANY ($1::text[]) OR recipient = ANY ($2::text[])
    OR EXISTS (SELECT FROM unnest($3::text[]) AS n (needle)
                WHERE position(n.needle IN concat(payload, error_message, message_id)) > 0);

-- name: letters
SELECT id, status, payload::text AS payload, error_message,
       session_key = ANY ($1::text[]) OR coalesce(phone_number = ANY ($2::text[]), false) AS own
  FROM webhook_dlq
 WHERE session_key = ANY ($1::text[]) OR phone_number = ANY ($2::text[])
    OR EXISTS (SELECT FROM unnest($3::text[]) AS n (needle)
                WHERE position(n.needle IN concat(payload, error_message)) > 0);

-- name: statuses
SELECT phone_number_id, message_id FROM whatsapp_statuses
 WHERE EXISTS (SELECT FROM unnest($1::text[]) AS n (needle) WHERE position(n.needle IN message_id) > 0);

-- name: sessions
SELECT session_key, version, state::text AS state, session_key = ANY ($1::text[]) AS own FROM user_sessions
 WHERE session_key = ANY ($1::text[])
    OR EXISTS (SELECT FROM unnest($2::text[]) AS n (needle) WHERE position(n.needle IN state::text) > 0);

-- name: redact_reply
UPDATE whatsapp_outbox SET payload = $2, error_message = $3 WHERE id = $1;

-- name: redact_letter
UPDATE webhook_dlq SET payload = $2, error_message = $3 WHERE id = $1;

-- name: redact_session
UPDATE user_sessions SET state = $3 WHERE session_key = $1 AND version = $2;

-- name: forget
SELECT postroom_forget($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13);
