-- name: select
-- Newest first; without $1 only those with malformed items, for a reason where one is given.
SELECT e.event_id, e.received_at, e.app, e.correlation_id, e.partial, octet_length(e.body) AS bytes,
       coalesce(i.malformed, 0) AS malformed, i.reasons
  FROM wa_events e
  LEFT JOIN (SELECT event_id, count(*) AS malformed, array_agg(DISTINCT reason) AS reasons
               FROM whatsapp_messages_items WHERE bucket = 'malformed' AND ($2::text IS NULL OR reason = $2)
              GROUP BY event_id) i ON i.event_id = e.event_id
 WHERE $1 OR i.event_id IS NOT NULL
 ORDER BY e.event_id DESC LIMIT $3;

-- name: show
SELECT event_id, received_at, app, correlation_id, traceparent, partial, body FROM wa_events WHERE event_id = $1;

-- name: malformed
SELECT path, kind::text AS kind, reason FROM whatsapp_messages_items
 WHERE event_id = $1 AND bucket = 'malformed' ORDER BY seq;

-- name: malformed_events
-- Oldest first, a page.
SELECT event_id, array_agg(path) AS paths FROM whatsapp_messages_items
 WHERE bucket = 'malformed' AND event_id > $1 AND ($2::bigint[] IS NULL OR event_id = ANY ($2))
   AND ($3::text IS NULL OR reason = $3)
 GROUP BY event_id ORDER BY event_id LIMIT $4;

-- name: forget_malformed
SELECT postroom_forget_malformed($1, $2);

-- name: mark_reparsed
SELECT postroom_mark_reparsed($1, $2, $3, $4);
