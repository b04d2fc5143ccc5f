-- name: register_writer
-- Kept for a month: long after any flush of a process that is gone can be in doubt.
WITH gone AS (DELETE FROM journal_writers WHERE started_at < $3::timestamptz - interval '30 days')
INSERT INTO journal_writers (writer, flush, started_at) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING;

-- name: append
SELECT * FROM postroom_append($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14);

-- name: append_erased
SELECT * FROM postroom_append_erased($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15);

-- name: resolve_flush
SELECT postroom_resolve_flush($1, $2);

-- name: dedup_key
SELECT value FROM postroom_keys WHERE name = 'dedup';

-- name: subjects_key
SELECT value FROM postroom_keys WHERE name = 'subjects';

-- name: erasures
SELECT subject, erased_at FROM postroom_erasures;

-- name: takes_no_writes
SELECT current_setting('transaction_read_only')::boolean;

-- name: newest
SELECT next_seq - 1 FROM journal_head WHERE shard = 0;

-- name: undelivered
-- From the low-water mark on, and the stragglers below it: what lies in the partitions does not matter.
WITH mark AS MATERIALIZED (SELECT low_water FROM delivery_tallies WHERE shard = 0),
     head AS MATERIALIZED (SELECT next_seq FROM journal_head WHERE shard = 0),
     open AS (
    SELECT i.seq, i.received_at, i.session_key FROM whatsapp_messages_items i
     WHERE i.seq >= (SELECT low_water FROM mark) AND i.seq < (SELECT next_seq FROM head)
       AND i.session_key IS NOT NULL
     UNION
    SELECT i.seq, i.received_at, i.session_key FROM journal_stragglers s
      JOIN whatsapp_messages_items i ON i.seq = s.seq
)
SELECT o.seq, o.session_key, (SELECT next_seq - 1 FROM head) AS newest FROM open o
 WHERE NOT EXISTS (SELECT FROM message_outcomes c WHERE c.seq = o.seq AND c.received_at = o.received_at)
 ORDER BY o.seq;

-- name: tail
SELECT i.seq, i.key, i.message_id, i.session_key, i.phone_number_id, i.received_at, i.path, i.joins, i.event_id,
       e.correlation_id, e.traceparent, e.body
  FROM whatsapp_messages_items i
  LEFT JOIN wa_events e ON e.event_id = i.event_id AND e.received_at = i.received_at
 WHERE i.seq > $1 AND i.seq <= $2 AND i.session_key IS NOT NULL
 ORDER BY i.seq;

-- name: read
SELECT i.seq, i.key, i.message_id, i.session_key, i.phone_number_id, i.received_at, i.path, i.joins, i.event_id,
       e.correlation_id, e.traceparent, e.body
  FROM whatsapp_messages_items i
  LEFT JOIN wa_events e ON e.event_id = i.event_id AND e.received_at = i.received_at
 WHERE i.seq = ANY ($1::bigint[])
 ORDER BY i.seq;

-- name: load_sessions
SELECT session_key, phone_number_id, wa_id, user_id, active_service, state::text AS state, version, last_interaction
  FROM user_sessions WHERE session_key = ANY ($1::text[]);

-- name: complete
SELECT postroom_complete($1, $2, $3, $4, $5::postroom_done[], $6::postroom_session[], $7::postroom_reply[], $8,
                         $9::postroom_letter[]);

-- name: complete_replay
SELECT postroom_complete_replay($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19,
                                $20, $21);

-- name: bound_lock_waits
SET lock_timeout = '2s';

-- name: make_partitions
SELECT postroom_make_partitions($1, $2);

-- name: rotate_dedup_ledger
SELECT postroom_rotate_dedup_ledger($1, $2);

-- name: home_menu
SELECT country, language, domain, title, description FROM whatsapp_home_menu_items
 WHERE active ORDER BY country NULLS LAST, language, position, id;
