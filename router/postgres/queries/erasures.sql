-- name: known_by
SELECT name, session_key, phone_number_id FROM session_names WHERE name = ANY ($1::text[]) OR session_key = ANY ($2::text[]);

-- name: hold_archives
-- No archive is begun while this session is there.
SELECT pg_advisory_lock(7305, 6);

-- name: restored_copies
-- What `postroom archive restore` made: named as partitions, and none.
SELECT n.nspname || '.' || c.relname AS name FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind = 'r' AND NOT c.relispartition AND n.nspname <> current_schema()
   AND c.relname ~ '^(whatsapp_messages|message_outcomes|whatsapp_outbox|wa_events)_y[0-9]{4}[mw][0-9]{2}'
 ORDER BY 1;

-- name: unfinished_archives
SELECT name FROM postroom_archives WHERE state <> 'archived' ORDER BY name;

-- name: bury
SELECT postroom_bury($1, $2);

-- name: marks
SELECT next_event FROM journal_head WHERE shard = 0;

-- Reading everything, a page at a time in the order of a key, so that no statement and no snapshot lasts. Of each page
-- come the rows that are of concern, and the last one, after which the next page begins.

-- name: events
-- Bodies that may mention the person: that hold a name ($4), or escapes ($5) behind which one may be.
SELECT p.event_id, p.hit FROM (
    SELECT event_id, row_number() OVER (ORDER BY event_id DESC) = 1 AS is_last,
           EXISTS (SELECT FROM unnest($4::bytea[]) AS n (needle) WHERE position(n.needle IN body) > 0)
           OR (position('\x5c753030'::bytea IN body) > 0  -- \u00
               AND EXISTS (SELECT FROM unnest($5::bytea[]) AS n (needle) WHERE position(n.needle IN body) > 0)) AS hit
      FROM (SELECT event_id, body FROM wa_events WHERE event_id > $1 AND event_id < $3 ORDER BY event_id LIMIT $2) e) p
 WHERE p.hit OR p.is_last ORDER BY p.event_id;

-- name: items
SELECT seq, received_at, event_id, path FROM whatsapp_messages_items
 WHERE event_id = ANY ($1::bigint[]) AND bucket IS DISTINCT FROM 'erased' ORDER BY seq;

-- name: bodies
SELECT event_id, received_at, body FROM wa_events WHERE event_id = ANY ($1::bigint[]) ORDER BY event_id;

-- name: erase_items
SELECT postroom_erase_items($1, $2, $3, $4, $5, $6, $7);

-- name: erase_archived
SELECT postroom_erase_archived($1, $2, $3, $4, $5);

-- name: replies
SELECT p.* FROM (
    SELECT id, phone_number_id, message_id, payload::text AS payload, error_message,
           row_number() OVER (ORDER BY id DESC) = 1 AS is_last,
           session_key = ANY ($3::text[]) OR coalesce(recipient = ANY ($4::text[]), false) AS own,
           EXISTS (SELECT FROM unnest($5::text[]) AS n (needle)
                    WHERE position(n.needle IN concat(payload, error_message, message_id, idempotency_key)) > 0)
               AS hit
      FROM (SELECT * FROM whatsapp_outbox WHERE id > $1 ORDER BY id LIMIT $2) o) p
 WHERE p.own OR p.hit OR p.is_last ORDER BY p.id;

-- name: letters
SELECT p.* FROM (
    SELECT id, status, payload::text AS payload, error_message, row_number() OVER (ORDER BY id DESC) = 1 AS is_last,
           session_key = ANY ($3::text[]) OR coalesce(phone_number = ANY ($4::text[]), false) AS own,
           EXISTS (SELECT FROM unnest($5::text[]) AS n (needle)
                    WHERE position(n.needle IN concat(payload, error_message)) > 0) AS hit
      FROM (SELECT * FROM webhook_dlq WHERE id > $1 ORDER BY id LIMIT $2) d) p
 WHERE p.own OR p.hit OR p.is_last ORDER BY p.id;

-- name: statuses
SELECT p.* FROM (
    SELECT phone_number_id, message_id, false AS own,
           row_number() OVER (ORDER BY phone_number_id DESC, message_id DESC) = 1 AS is_last,
           EXISTS (SELECT FROM unnest($4::text[]) AS n (needle) WHERE position(n.needle IN message_id) > 0) AS hit
      FROM (SELECT phone_number_id, message_id FROM whatsapp_statuses WHERE (phone_number_id, message_id) > ($1, $2)
             ORDER BY phone_number_id, message_id LIMIT $3) s) p
 WHERE p.hit OR p.is_last ORDER BY p.phone_number_id, p.message_id;

-- name: sessions
SELECT p.* FROM (
    SELECT session_key, version, state::text AS state, row_number() OVER (ORDER BY session_key DESC) = 1 AS is_last,
           session_key = ANY ($3::text[]) AS own,
           coalesce(wa_id = ANY ($5::text[]) OR user_id = ANY ($5::text[]), false) AS named,
           EXISTS (SELECT FROM unnest($4::text[]) AS n (needle) WHERE position(n.needle IN state::text) > 0) AS hit
      FROM (SELECT * FROM user_sessions WHERE session_key > $1 ORDER BY session_key LIMIT $2) u) p
 WHERE p.own OR p.named OR p.hit OR p.is_last ORDER BY p.session_key;

-- Unless somebody changed it meanwhile.

-- name: redact_reply
WITH told AS (DELETE FROM status_deliveries WHERE outbox_id = $1)
UPDATE whatsapp_outbox SET payload = $2, error_message = $3, idempotency_key = NULL
 WHERE id = $1 AND payload::text = $4 AND error_message IS NOT DISTINCT FROM $5 RETURNING 1;

-- name: redact_letter
UPDATE webhook_dlq SET payload = $2, error_message = $3
 WHERE id = $1 AND payload::text = $4 AND error_message IS NOT DISTINCT FROM $5 RETURNING 1;

-- name: redact_session
UPDATE user_sessions SET state = $3 WHERE session_key = $1 AND version = $2 AND state::text = $4 RETURNING 1;

-- name: forget
SELECT postroom_forget($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13);
