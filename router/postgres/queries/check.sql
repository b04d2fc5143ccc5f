-- name: recount
-- Everything that is there, in one pass over items and outcomes, beside the tallies; and how much of it is not as it
-- should be, or is so only while an archive is made.
WITH pass AS (
    SELECT count(i.seq) AS items, coalesce(sum(i.seq), 0) AS seqs,
           count(*) FILTER (WHERE i.bucket = 'malformed') AS items_malformed,
           count(*) FILTER (WHERE i.bucket = 'handled') AS items_handled,
           count(*) FILTER (WHERE i.bucket = 'erased') AS items_erased,
           count(*) FILTER (WHERE i.seq IS NOT NULL AND i.bucket IS NULL) AS items_open,
           count(o.seq) AS outcomes,
           count(*) FILTER (WHERE o.outcome = 'handled') AS outcomes_handled,
           count(*) FILTER (WHERE o.outcome = 'delivered') AS outcomes_delivered,
           count(*) FILTER (WHERE o.outcome = 'rejected') AS outcomes_rejected,
           count(*) FILTER (WHERE o.outcome = 'dead_letter') AS outcomes_dead_letter,
           count(*) FILTER (WHERE o.outcome = 'deferred') AS outcomes_deferred,
           count(*) FILTER (WHERE o.outcome = 'discarded') AS outcomes_discarded,
           count(*) FILTER (WHERE i.seq IS NULL) AS outcomes_without_item,
           count(*) FILTER (WHERE o.seq IS NOT NULL AND i.bucket IS NOT NULL) AS outcomes_of_no_session,
           count(*) FILTER (WHERE i.seq IS NOT NULL AND i.bucket IS NULL AND i.session_key IS NULL) AS items_of_no_session
      FROM whatsapp_messages_items i FULL JOIN message_outcomes o ON o.seq = i.seq AND o.received_at = i.received_at
), letters AS (
    SELECT count(*) FILTER (WHERE d.status = 'pending') AS letters_pending,
           count(*) FILTER (WHERE d.status = 'processing') AS letters_processing,
           count(*) FILTER (WHERE d.status = 'failed') AS letters_failed,
           count(*) FILTER (WHERE d.status = 'reprocessed') AS letters_reprocessed,
           count(*) FILTER (WHERE d.status <> 'reprocessed' AND o.outcome IN ('dead_letter', 'rejected', 'deferred'))
               AS outcomes_with_letter,
           count(*) FILTER (WHERE postroom_letter_is_astray(d, o.outcome)) AS letters_astray
      FROM webhook_dlq d LEFT JOIN message_outcomes o ON o.seq = d.seq AND o.received_at = d.received_at
), replies AS (
    SELECT count(*) FILTER (WHERE status = 'unsent') AS replies_unsent,
           count(*) FILTER (WHERE status = 'pending') AS replies_pending,
           count(*) FILTER (WHERE status = 'sent') AS replies_sent,
           count(*) FILTER (WHERE status = 'failed') AS replies_failed
      FROM whatsapp_outbox
)
SELECT p.*, l.*, r.*, (SELECT count(*) FROM whatsapp_messages_items i WHERE NOT EXISTS (
           SELECT FROM wa_events e WHERE e.event_id = i.event_id AND e.received_at = i.received_at)) AS items_without_event
  FROM pass p CROSS JOIN letters l CROSS JOIN replies r;

-- name: tallies
SELECT h.received, h.duplicates, h.malformed, h.handled AS handled_at_once, h.erased, h.next_seq - 1 AS journaled,
       t.handled, t.delivered, t.rejected, t.dead_letter, t.deferred, t.discarded, t.unreadable_answer
  FROM journal_head h CROSS JOIN delivery_tallies t WHERE h.shard = 0 AND t.shard = 0;

-- name: archived
-- What archives count for, by the names of `recount`.
SELECT a.*, postroom_archived_erased() AS items_erased,
       (SELECT coalesce(sum((lower(r.seqs) + upper(r.seqs) - 1)::numeric * (upper(r.seqs) - lower(r.seqs)) / 2), 0)
          FROM postroom_archived_tallies t CROSS JOIN unnest(t.seqs) AS r (seqs) WHERE t.items_are_out) AS seqs
  FROM postroom_archived_sums() a;

-- name: missing_items
-- Seqs have no gaps, so one that is not there, nor in an archive, was removed.
SELECT before + 1 AS first, seq - 1 AS last
  FROM (SELECT seq, lag(seq, 1, 0::bigint) OVER (ORDER BY seq) AS before
          FROM (SELECT seq FROM whatsapp_messages_items
                UNION SELECT next_seq FROM journal_head WHERE shard = 0) s) g
 WHERE seq <> before + 1
   AND NOT coalesce((SELECT range_agg(r.seqs) FROM postroom_archived_tallies t CROSS JOIN unnest(t.seqs) AS r (seqs)
                      WHERE t.items_are_out AND r.seqs && int8range(before + 1, seq)) @> int8range(before + 1, seq),
                    false)
 ORDER BY seq LIMIT 20;

-- name: strays
SELECT 'item without its event' AS problem, i.seq FROM whatsapp_messages_items i
  LEFT JOIN wa_events e ON e.event_id = i.event_id AND e.received_at = i.received_at WHERE e.event_id IS NULL
UNION ALL
SELECT 'outcome without its item', o.seq FROM message_outcomes o
  LEFT JOIN whatsapp_messages_items i ON i.seq = o.seq AND i.received_at = o.received_at
 WHERE i.seq IS NULL AND NOT EXISTS (SELECT FROM postroom_archived_tallies t WHERE t.items_are_out AND t.seqs @> o.seq)
UNION ALL
SELECT 'outcome of an item that no session takes', o.seq FROM message_outcomes o
  JOIN whatsapp_messages_items i ON i.seq = o.seq AND i.received_at = o.received_at WHERE i.bucket IS NOT NULL
UNION ALL
SELECT 'unfinished item without a session', i.seq FROM whatsapp_messages_items i
 WHERE i.bucket IS NULL AND i.session_key IS NULL
UNION ALL
SELECT 'dead letter outcome without its dead letter', o.seq FROM message_outcomes o
  LEFT JOIN webhook_dlq d ON d.seq = o.seq
 WHERE o.outcome IN ('dead_letter', 'rejected', 'deferred') AND (d.seq IS NULL OR d.status = 'reprocessed')
UNION ALL
SELECT 'dead letter without its outcome', d.seq FROM webhook_dlq d
  LEFT JOIN message_outcomes o ON o.seq = d.seq AND o.received_at = d.received_at
 WHERE postroom_letter_is_astray(d, o.outcome)
UNION ALL
SELECT 'unfinished item that the recovery would not find', i.seq FROM whatsapp_messages_items i
 CROSS JOIN delivery_tallies t
 WHERE t.shard = 0 AND i.bucket IS NULL AND i.seq < t.low_water
   AND NOT EXISTS (SELECT FROM message_outcomes o WHERE o.seq = i.seq AND o.received_at = i.received_at)
   AND NOT EXISTS (SELECT FROM journal_stragglers s WHERE s.seq = i.seq)
LIMIT 20;

-- name: undelivered_count
-- What a start would find.
WITH mark AS MATERIALIZED (SELECT low_water FROM delivery_tallies WHERE shard = 0)
SELECT count(*) FROM (
    SELECT i.seq, i.received_at FROM whatsapp_messages_items i
     WHERE i.seq >= (SELECT low_water FROM mark) AND i.bucket IS NULL
     UNION
    SELECT i.seq, i.received_at FROM journal_stragglers s JOIN whatsapp_messages_items i ON i.seq = s.seq
     WHERE i.bucket IS NULL) open
 WHERE NOT EXISTS (SELECT FROM message_outcomes o WHERE o.seq = open.seq AND o.received_at = open.received_at);

-- name: became_of
-- Every item with this id, newest first: what `postroom send` prints.
SELECT seq, place, service, rule, attempts, completed_at, reason FROM whatsapp_messages
 WHERE seq = ANY (ARRAY(SELECT seq FROM dedup_ledger_0 WHERE key = $1
                        UNION ALL SELECT seq FROM dedup_ledger_1 WHERE key = $1)) AND direction = 'inbound';
