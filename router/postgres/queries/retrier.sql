-- name: release_dead_letters
SELECT postroom_release_dead_letters($1, $2, $3, $4, $5);

-- name: claim_dead_letters
-- The bytes where they still are, else the message as the letter keeps it; an edited one is always the latter.
-- A letter whose item was archived has taken the key along; one whose item is gone altogether has the one that is
-- left to it, the same each time.
SELECT d.id, d.seq, d.service, d.resolution, d.revision, d.retry_count, d.attempts, d.keeps_order, d.message_id, d.session_key, d.received_at,
       d.phone_number, d.correlation_id, d.payload::text AS payload, i.path, e.traceparent, e.body,
       coalesce(i.key, d.item_key, uuid_send(d.id)) AS key,
       coalesce(i.phone_number_id, split_part(d.session_key, ':', 1)) AS phone_number_id
  FROM postroom_claim_dead_letters($1, $2, $3, $4, $5) d
  LEFT JOIN whatsapp_messages_items i ON i.seq = d.seq AND i.received_at = d.received_at
  LEFT JOIN wa_events e ON e.event_id = i.event_id AND e.received_at = i.received_at
 ORDER BY d.seq;

-- name: expire_dead_letters
SELECT postroom_expire_dead_letters($1, $2, $3);

-- name: log_retry_run
SELECT service, due FROM postroom_log_retry_run($1, $2, $3, $4, $5, $6, $7);

-- name: held_pairs
SELECT session_key, service FROM postroom_held_pairs();

-- name: ask_for_run
SELECT process_dlq_entries();

-- name: dead_letter_counts
SELECT count(*) FILTER (WHERE status IN ('pending', 'processing')) AS open,
       count(*) FILTER (WHERE status = 'failed' AND resolution IN ('exhausted', 'rejected')) AS failed,
       (SELECT max(processed_at) FROM dlq_processing_log) AS last_run
  FROM webhook_dlq WHERE status IN ('pending', 'processing', 'failed');
