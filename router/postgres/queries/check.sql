-- name: counts
-- Tables against tallies, in one snapshot.
SELECT h.received, h.duplicates, h.malformed, h.handled AS handled_at_once, h.erased, h.next_seq - 1 AS journaled,
       t.handled, t.delivered, t.rejected, t.dead_letter, t.deferred, t.discarded, t.unreadable_answer, t.low_water,
       i.items + a.items AS items, i.items_malformed + a.items_malformed AS items_malformed,
       i.items_handled + a.items_handled AS items_handled,
       i.items_erased + postroom_archived_erased() AS items_erased, i.items_open + a.items_open AS items_open,
       o.outcomes + a.outcomes AS outcomes, o.outcomes_handled + a.outcomes_handled AS outcomes_handled,
       o.outcomes_delivered + a.outcomes_delivered AS outcomes_delivered,
       o.outcomes_rejected + a.outcomes_rejected AS outcomes_rejected,
       o.outcomes_dead_letter + a.outcomes_dead_letter AS outcomes_dead_letter,
       o.outcomes_deferred + a.outcomes_deferred AS outcomes_deferred,
       o.outcomes_discarded + a.outcomes_discarded AS outcomes_discarded, a.items AS items_archived,
       d.letters_pending, d.letters_processing, d.letters_failed, d.letters_reprocessed,
       r.replies_unsent, r.replies_pending, r.replies_sent, r.replies_failed
  FROM journal_head h
 CROSS JOIN delivery_tallies t
 CROSS JOIN (SELECT count(*) AS items,
                    count(*) FILTER (WHERE bucket = 'malformed') AS items_malformed,
                    count(*) FILTER (WHERE bucket = 'handled') AS items_handled,
                    count(*) FILTER (WHERE bucket = 'erased') AS items_erased,
                    count(*) FILTER (WHERE bucket IS NULL) AS items_open
               FROM whatsapp_messages_items) i
 CROSS JOIN (SELECT count(*) AS outcomes,
                    count(*) FILTER (WHERE outcome = 'handled') AS outcomes_handled,
                    count(*) FILTER (WHERE outcome = 'delivered') AS outcomes_delivered,
                    count(*) FILTER (WHERE outcome = 'rejected') AS outcomes_rejected,
                    count(*) FILTER (WHERE outcome = 'dead_letter') AS outcomes_dead_letter,
                    count(*) FILTER (WHERE outcome = 'deferred') AS outcomes_deferred,
                    count(*) FILTER (WHERE outcome = 'discarded') AS outcomes_discarded
               FROM message_outcomes) o
 CROSS JOIN (SELECT count(*) FILTER (WHERE status = 'pending') AS letters_pending,
                    count(*) FILTER (WHERE status = 'processing') AS letters_processing,
                    count(*) FILTER (WHERE status = 'failed') AS letters_failed,
                    count(*) FILTER (WHERE status = 'reprocessed') AS letters_reprocessed
               FROM webhook_dlq) d
 CROSS JOIN (SELECT count(*) FILTER (WHERE status = 'unsent') AS replies_unsent,
                    count(*) FILTER (WHERE status = 'pending') AS replies_pending,
                    count(*) FILTER (WHERE status = 'sent') AS replies_sent,
                    count(*) FILTER (WHERE status = 'failed') AS replies_failed
               FROM whatsapp_outbox) r
 CROSS JOIN postroom_archived_sums() a
 WHERE h.shard = 0 AND t.shard = 0;

-- name: missing_items
-- Seqs have no gaps, so one that is not there, nor in an archive, was removed.
SELECT before + 1 AS first, seq - 1 AS last
  FROM (SELECT seq, lag(seq, 1, 0::bigint) OVER (ORDER BY seq) AS before
          FROM (SELECT seq FROM whatsapp_messages_items
                UNION ALL SELECT next_seq FROM journal_head WHERE shard = 0) s) g
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
 CROSS JOIN LATERAL (SELECT coalesce(o.outcome, d.item_outcome) AS outcome) e
 WHERE e.outcome IS NULL OR (d.status = 'reprocessed') <> (e.outcome = 'delivered')
    OR (d.resolution IS NOT DISTINCT FROM 'discarded') <> (e.outcome = 'discarded')
    OR (d.resolution IS NOT DISTINCT FROM 'deferred') <> (e.outcome = 'deferred')
UNION ALL
SELECT 'unfinished item that the recovery would not find', i.seq FROM whatsapp_messages_items i
 CROSS JOIN delivery_tallies t
 WHERE t.shard = 0 AND i.bucket IS NULL AND i.seq < t.low_water
   AND NOT EXISTS (SELECT FROM message_outcomes o WHERE o.seq = i.seq AND o.received_at = i.received_at)
   AND NOT EXISTS (SELECT FROM journal_stragglers s WHERE s.seq = i.seq)
LIMIT 20;

-- name: undelivered_count
SELECT count(*) FROM whatsapp_messages_items i
 WHERE i.bucket IS NULL
   AND NOT EXISTS (SELECT FROM message_outcomes o WHERE o.seq = i.seq AND o.received_at = i.received_at);

-- name: became_of
-- Every item with this id, newest first: what `postroom send` prints.
SELECT seq, place, service, rule, attempts, completed_at, reason FROM whatsapp_messages
 WHERE seq = ANY (ARRAY(SELECT seq FROM dedup_ledger_0 WHERE key = $1
                        UNION ALL SELECT seq FROM dedup_ledger_1 WHERE key = $1)) AND direction = 'inbound';
