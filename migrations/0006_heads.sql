-- What the retrier takes next is found by conversation and service, however many letters wait behind the oldest one of
-- each. The functions that are here again are those of 0003, told so.

DROP INDEX webhook_dlq_open;
DROP INDEX webhook_dlq_pending;
CREATE INDEX webhook_dlq_pairs ON webhook_dlq (service, session_key, seq) WHERE status IN ('pending', 'processing');
CREATE INDEX webhook_dlq_processing ON webhook_dlq (service, session_key) WHERE status = 'processing';
CREATE INDEX webhook_dlq_requested ON webhook_dlq (service, session_key, seq)
    WHERE status = 'pending' AND retry_requested_at IS NOT NULL;

-- The services that have open letters, and the conversations that have some for one: one step in the index each.
CREATE FUNCTION postroom_open_services() RETURNS SETOF text LANGUAGE sql STABLE
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off AS $$
    WITH RECURSIVE steps AS (
        (SELECT service FROM webhook_dlq WHERE status IN ('pending', 'processing') ORDER BY service LIMIT 1)
        UNION ALL
        SELECT (SELECT d.service FROM webhook_dlq d
                 WHERE d.status IN ('pending', 'processing') AND d.service > s.service ORDER BY d.service LIMIT 1)
          FROM steps s WHERE s.service IS NOT NULL
    ) SELECT service FROM steps WHERE service IS NOT NULL
$$;

CREATE FUNCTION postroom_open_conversations(p_service text) RETURNS SETOF text LANGUAGE sql STABLE
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off AS $$
    WITH RECURSIVE steps AS (
        (SELECT session_key FROM webhook_dlq
          WHERE service = p_service AND status IN ('pending', 'processing') ORDER BY session_key LIMIT 1)
        UNION ALL
        SELECT (SELECT d.session_key FROM webhook_dlq d
                 WHERE d.service = p_service AND d.status IN ('pending', 'processing') AND d.session_key > s.session_key
                 ORDER BY d.session_key LIMIT 1)
          FROM steps s WHERE s.session_key IS NOT NULL
    ) SELECT session_key FROM steps WHERE session_key IS NOT NULL
$$;

-- The oldest open letter of each conversation with these services.
CREATE FUNCTION postroom_heads(p_services text[]) RETURNS SETOF webhook_dlq LANGUAGE sql STABLE
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off AS $$
    SELECT head.* FROM unnest(p_services) AS w (service)
     CROSS JOIN LATERAL postroom_open_conversations(w.service) AS k (session_key)
     CROSS JOIN LATERAL (SELECT * FROM webhook_dlq d
                          WHERE d.service = w.service AND d.session_key = k.session_key
                            AND d.status IN ('pending', 'processing')
                          ORDER BY d.seq LIMIT 1) head
$$;

-- Letters of a conversation behind an oldest one that lets others past: the next few, and the first that was asked for.
CREATE FUNCTION postroom_behind(p_head webhook_dlq) RETURNS SETOF webhook_dlq LANGUAGE sql STABLE
SET enable_seqscan = off SET enable_bitmapscan = off AS $$
    (SELECT * FROM webhook_dlq d
      WHERE d.service = p_head.service AND d.session_key = p_head.session_key
        AND d.status IN ('pending', 'processing') AND d.seq > p_head.seq
      ORDER BY d.seq LIMIT 50)
    UNION ALL
    (SELECT * FROM webhook_dlq d
      WHERE d.service = p_head.service AND d.session_key = p_head.session_key
        AND d.status = 'pending' AND d.retry_requested_at IS NOT NULL AND d.seq > p_head.seq
      ORDER BY d.seq LIMIT 1)
$$;

CREATE OR REPLACE FUNCTION postroom_claim_dead_letters(
    p_epoch bigint, p_now timestamptz, p_limit integer, p_services text[], p_others boolean
) RETURNS SETOF webhook_dlq LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
DECLARE
    wanted text[] := p_services;
    chosen uuid[];
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    IF p_others THEN
        wanted := ARRAY(SELECT s.service FROM postroom_open_services() AS s (service)
                         WHERE s.service <> ALL (p_services));
    END IF;
    WITH heads AS MATERIALIZED (
        SELECT h AS head, h.retry_requested_at IS NOT NULL
               OR (NOT p_others AND coalesce(postroom_is_due(h, p_now), false)) AS goes
          FROM postroom_heads(wanted) h
         WHERE NOT EXISTS (SELECT FROM webhook_dlq p
                            WHERE p.service = h.service AND p.session_key = h.session_key
                              AND p.status = 'processing')
    ), found AS (
        SELECT (h.head).id, (h.head).attempts, (h.head).seq FROM heads h WHERE h.goes
        UNION ALL
        SELECT next.id, next.attempts, next.seq
          FROM heads h CROSS JOIN LATERAL (
            SELECT c.id, c.attempts, c.seq FROM postroom_behind(h.head) c
             WHERE c.status = 'pending'
               AND (c.retry_requested_at IS NOT NULL OR (NOT p_others AND postroom_is_due(c, p_now)))
               AND NOT EXISTS (
                    SELECT FROM webhook_dlq o
                     WHERE o.session_key = c.session_key AND o.service = c.service
                       AND o.status IN ('pending', 'processing') AND o.seq < c.seq
                       AND (o.keeps_order
                            -- What was deferred goes past an older one. What nobody asked for waits for any such,
                            -- what somebody asked for only for one that goes now.
                            OR (c.resolution IS DISTINCT FROM 'deferred'
                                AND (c.retry_requested_at IS NULL OR o.retry_requested_at IS NOT NULL))))
             ORDER BY c.seq LIMIT 1) next
         WHERE NOT h.goes AND NOT (h.head).keeps_order
    )
    -- A single one is, of the oldest, the one that was attempted least: it may be that the one before it is what the
    -- service stumbles over.
    SELECT array_agg(o.id) INTO chosen FROM (
        SELECT f.id FROM (SELECT * FROM found ORDER BY seq LIMIT greatest(p_limit, 50)) f
         ORDER BY CASE WHEN p_limit = 1 THEN f.attempts END, f.seq LIMIT p_limit) o;
    RETURN QUERY
    UPDATE webhook_dlq d
       SET status = 'processing', claimed_epoch = p_epoch, updated_at = p_now
     WHERE d.id = ANY (chosen) AND d.status = 'pending'
    RETURNING d.*;
END $$;

CREATE OR REPLACE FUNCTION postroom_log_retry_run(
    p_epoch bigint, p_now timestamptz, p_processed integer, p_failed integer, p_error text, p_services text[]
) RETURNS TABLE (service text, due timestamptz) LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    INSERT INTO dlq_processing_log (processed_at, status, entries_processed, entries_failed, error_message)
    VALUES (p_now, CASE WHEN p_error IS NULL THEN 'completed' ELSE 'failed' END, p_processed, p_failed, p_error);
    RETURN QUERY
    WITH heads AS MATERIALIZED (
        SELECT h AS head FROM postroom_heads(ARRAY(SELECT postroom_open_services())) h
    ), letters AS (
        SELECT (h.head).service, (h.head).status, (h.head).resolution, (h.head).retry_requested_at,
               (h.head).next_retry_at
          FROM heads h
        UNION ALL
        SELECT b.service, b.status, b.resolution, b.retry_requested_at, b.next_retry_at
          FROM heads h CROSS JOIN LATERAL postroom_behind(h.head) b
         WHERE NOT (h.head).keeps_order
           AND (b.retry_requested_at IS NOT NULL OR b.resolution = 'deferred')
           AND NOT EXISTS (SELECT FROM webhook_dlq o
                            WHERE o.session_key = b.session_key AND o.service = b.service
                              AND o.status IN ('pending', 'processing') AND o.seq < b.seq AND o.keeps_order)
    )
    SELECT l.service, min(CASE WHEN l.retry_requested_at IS NOT NULL OR l.resolution IN ('no_service', 'deferred')
                               THEN p_now ELSE l.next_retry_at END)
      FROM letters l
     WHERE l.status = 'pending' AND (l.retry_requested_at IS NOT NULL OR l.service = ANY (p_services))
     GROUP BY l.service
    HAVING min(CASE WHEN l.retry_requested_at IS NOT NULL OR l.resolution IN ('no_service', 'deferred')
                    THEN p_now ELSE l.next_retry_at END) IS NOT NULL;
END $$;

-- Who waits behind a letter that keeps the order.
CREATE FUNCTION postroom_held_pairs() RETURNS TABLE (session_key text, service text) LANGUAGE sql STABLE
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off AS $$
    WITH RECURSIVE steps AS (
        (SELECT d.session_key, d.service FROM webhook_dlq d
          WHERE d.keeps_order AND d.status IN ('pending', 'processing') ORDER BY d.session_key, d.service LIMIT 1)
        UNION ALL
        SELECT next.session_key, next.service
          FROM steps s CROSS JOIN LATERAL (
            SELECT d.session_key, d.service FROM webhook_dlq d
             WHERE d.keeps_order AND d.status IN ('pending', 'processing')
               AND (d.session_key, d.service) > (s.session_key, s.service)
             ORDER BY d.session_key, d.service LIMIT 1) next
    ) SELECT session_key, service FROM steps
$$;
