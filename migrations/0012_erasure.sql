-- Erasure: one person taken out of everything. What is left of an item is its seq, its place and its hash; what is left of
-- the person is a hash of each name with the time, so that nothing older is taken in again.

-- No flush and no completion is under way, whose locks would be taken in another order.
SELECT pg_advisory_xact_lock(7305, 1), pg_advisory_xact_lock(7305, 2);

ALTER TABLE journal_head ADD COLUMN erased bigint NOT NULL DEFAULT 0;
COMMENT ON COLUMN wa_events.partial IS 'Not as it was received: duplicates were cut out, or a person was erased';

CREATE TABLE postroom_erasures (
    subject   text PRIMARY KEY,
    erased_at timestamptz NOT NULL
);
COMMENT ON TABLE postroom_erasures IS
    'Hashes of the names of erased persons (postroom_subject_hash): what they sent until then is not taken in again';
SELECT postroom_protect('postroom_erasures', 'r', 'r', '');

-- A flush with items of erased persons: they are counted as such.
CREATE FUNCTION postroom_append_erased(
    p_writer uuid, p_flush bigint, p_now timestamptz, p_notify boolean,
    p_duplicates bigint, p_malformed bigint, p_handled bigint,
    p_events postroom_event[], p_items postroom_item[],
    s_number text[], s_message_id text[], s_status text[], s_rank smallint[], s_at timestamptz[], p_erased bigint,
    OUT first_seq bigint, OUT dup_positions integer[], OUT dup_seqs bigint[], OUT session_keys text[],
    OUT join_positions integer[], OUT join_keys text[]
) LANGUAGE plpgsql AS $$
BEGIN
    SELECT a.first_seq, a.dup_positions, a.dup_seqs, a.session_keys, a.join_positions, a.join_keys
      INTO first_seq, dup_positions, dup_seqs, session_keys, join_positions, join_keys
      FROM postroom_append(p_writer, p_flush, p_now, p_notify, p_duplicates, p_malformed, p_handled, p_events, p_items,
                           s_number, s_message_id, s_status, s_rank, s_at) a;
    IF dup_positions IS NULL THEN
        UPDATE journal_head SET erased = erased + p_erased WHERE shard = 0;
    END IF;
END $$;

-- One page. Nothing is changed, and the seqs returned, where items are under way: not decided yet, or a dead letter of
-- theirs being delivered; w_ are those of others in the same bodies, which somebody may hold as they were. Rows of which
-- the item is not there any more are in an archive.
CREATE FUNCTION postroom_erase_items(
    p_seq bigint[], p_received timestamptz[], w_seq bigint[], w_received timestamptz[],
    e_id bigint[], e_received timestamptz[], e_body bytea[]
) RETURNS bigint[] LANGUAGE plpgsql SET enable_seqscan = off AS $$
DECLARE
    under_way bigint[];
    ended record;
    was record;
BEGIN
    -- No flush and no completion is under way: what is seen here is what there is.
    PERFORM pg_advisory_xact_lock(7305, 1), pg_advisory_xact_lock(7305, 2);
    SELECT array_agg(i.seq ORDER BY i.seq) INTO under_way
      FROM unnest(p_seq || w_seq, p_received || w_received) AS p (seq, received_at)
      JOIN whatsapp_messages_items i ON i.seq = p.seq AND i.received_at = p.received_at
      LEFT JOIN message_outcomes o ON o.seq = p.seq AND o.received_at = p.received_at
      LEFT JOIN webhook_dlq d ON d.seq = p.seq
     WHERE i.bucket IS NULL AND (o.seq IS NULL OR d.status = 'processing');
    IF under_way IS NOT NULL THEN
        RETURN under_way;
    END IF;
    DELETE FROM webhook_dlq WHERE seq = ANY (p_seq);
    DELETE FROM whatsapp_outbox WHERE id = ANY (ARRAY(
        SELECT o.id FROM unnest(p_seq, p_received) AS p (seq, received_at)
          JOIN whatsapp_messages_items i ON i.seq = p.seq AND i.received_at = p.received_at
          JOIN whatsapp_outbox o ON o.session_key = i.session_key AND o.seq = p.seq));
    WITH gone AS (
        DELETE FROM message_outcomes o USING unnest(p_seq, p_received) AS p (seq, received_at)
         WHERE o.seq = p.seq AND o.received_at = p.received_at
        RETURNING o.outcome
    )
    SELECT count(*) FILTER (WHERE outcome = 'handled') AS handled,
           count(*) FILTER (WHERE outcome = 'delivered') AS delivered,
           count(*) FILTER (WHERE outcome = 'rejected') AS rejected,
           count(*) FILTER (WHERE outcome = 'dead_letter') AS dead_letter,
           count(*) FILTER (WHERE outcome = 'deferred') AS deferred,
           count(*) FILTER (WHERE outcome = 'discarded') AS discarded
      INTO ended FROM gone;
    WITH before AS (
        SELECT i.seq, i.received_at, i.bucket FROM unnest(p_seq, p_received) AS p (seq, received_at)
          JOIN whatsapp_messages_items i ON i.seq = p.seq AND i.received_at = p.received_at
         WHERE i.bucket IS DISTINCT FROM 'erased'
    ), after AS (
        UPDATE whatsapp_messages_items i
           SET bucket = 'erased', reason = NULL, message_id = NULL, session_key = NULL, joins = NULL
          FROM before b WHERE i.seq = b.seq AND i.received_at = b.received_at
        RETURNING b.bucket
    )
    SELECT count(*) AS items, count(*) FILTER (WHERE bucket = 'malformed') AS malformed,
           count(*) FILTER (WHERE bucket = 'handled') AS handled
      INTO was FROM after;
    UPDATE wa_events e SET body = n.body, partial = true
      FROM unnest(e_id, e_received, e_body) AS n (event_id, received_at, body)
     WHERE e.event_id = n.event_id AND e.received_at = n.received_at;
    UPDATE delivery_tallies t
       SET handled = t.handled - ended.handled, delivered = t.delivered - ended.delivered,
           rejected = t.rejected - ended.rejected, dead_letter = t.dead_letter - ended.dead_letter,
           deferred = t.deferred - ended.deferred, discarded = t.discarded - ended.discarded
     WHERE shard = 0;
    UPDATE journal_head h
       SET malformed = h.malformed - was.malformed, handled = h.handled - was.handled, erased = h.erased + was.items
     WHERE shard = 0;
    RETURN NULL;
END $$;

-- Where items of an archive are now of which the dead letter is gone, by seq: the file says where they were.
ALTER TABLE postroom_archives ADD COLUMN moved jsonb NOT NULL DEFAULT '{}';

-- As in 0007, and what a letter knows of an item in an archive is kept there.
CREATE OR REPLACE FUNCTION postroom_clean_dead_letters(
    p_epoch bigint, p_before timestamptz, p_after bigint, p_limit integer, OUT removed integer, OUT last bigint
) LANGUAGE plpgsql SET enable_seqscan = off AS $$
DECLARE
    page bigint[];
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    page := ARRAY(SELECT seq FROM webhook_dlq WHERE seq > p_after ORDER BY seq LIMIT p_limit);
    WITH gone AS (
        DELETE FROM webhook_dlq
         WHERE seq = ANY (page) AND updated_at < p_before AND (status = 'reprocessed' OR resolution = 'discarded')
        RETURNING seq, item_outcome
    ), kept AS (
        UPDATE postroom_archives a SET moved = a.moved || m.moved
          FROM (SELECT b.name, jsonb_object_agg(g.seq, g.item_outcome) AS moved
                  FROM gone g JOIN postroom_archives b ON b.seqs @> g.seq
                 WHERE g.item_outcome IS NOT NULL GROUP BY b.name) m
         WHERE a.name = m.name
    )
    SELECT count(*) INTO removed FROM gone;
    last := page[cardinality(page)];
END $$;

-- The same for an archive, whose files were written again: p_bucket and p_outcome are what the old ones say of the items
-- that were erased. False: a dead letter of theirs is being delivered.
CREATE FUNCTION postroom_erase_archived(
    p_name text, p_tables jsonb, p_seq bigint[], p_bucket text[], p_outcome text[]
) RETURNS boolean LANGUAGE plpgsql SET enable_seqscan = off AS $$
DECLARE
    less jsonb;
    head record;
BEGIN
    PERFORM pg_advisory_xact_lock(7305, 1), pg_advisory_xact_lock(7305, 2);
    IF EXISTS (SELECT FROM webhook_dlq d WHERE d.seq = ANY (p_seq) AND d.status = 'processing') THEN
        RETURN false;
    END IF;
    WITH letters AS (
        DELETE FROM webhook_dlq d WHERE d.seq = ANY (p_seq) RETURNING d.seq, d.item_outcome
    ), items AS (
        SELECT p.bucket, coalesce(l.item_outcome, a.moved ->> p.seq::text, p.outcome) AS outcome
          FROM unnest(p_seq, p_bucket, p_outcome) AS p (seq, bucket, outcome)
          JOIN postroom_archives a ON a.name = p_name
          LEFT JOIN letters l ON l.seq = p.seq
    )
    SELECT jsonb_object_agg(c.key, c.n) INTO less
      FROM (SELECT 'items_' || coalesce(bucket, 'open') AS key, count(*) AS n FROM items GROUP BY bucket
             UNION ALL
            SELECT 'outcomes_' || outcome, count(*) FROM items WHERE outcome IS NOT NULL GROUP BY outcome
             UNION ALL
            SELECT 'outcomes', count(outcome) FROM items
             UNION ALL
            SELECT 'items_erased', -count(*) FROM items) c;
    UPDATE postroom_archives a
       SET tables = p_tables, moved = a.moved - p_seq::text[],
           tallies = (SELECT coalesce(jsonb_object_agg(k.key, coalesce((a.tallies ->> k.key)::bigint, 0)
                                                              - coalesce((less ->> k.key)::bigint, 0)), '{}')
                        FROM (SELECT jsonb_object_keys(a.tallies) UNION SELECT jsonb_object_keys(less)) AS k (key))
     WHERE a.name = p_name AND a.state = 'archived';
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no archive %', p_name;
    END IF;
    UPDATE delivery_tallies t
       SET handled = t.handled - coalesce((less ->> 'outcomes_handled')::bigint, 0),
           delivered = t.delivered - coalesce((less ->> 'outcomes_delivered')::bigint, 0),
           rejected = t.rejected - coalesce((less ->> 'outcomes_rejected')::bigint, 0),
           dead_letter = t.dead_letter - coalesce((less ->> 'outcomes_dead_letter')::bigint, 0),
           deferred = t.deferred - coalesce((less ->> 'outcomes_deferred')::bigint, 0),
           discarded = t.discarded - coalesce((less ->> 'outcomes_discarded')::bigint, 0)
     WHERE shard = 0;
    UPDATE journal_head h
       SET malformed = h.malformed - coalesce((less ->> 'items_malformed')::bigint, 0),
           handled = h.handled - coalesce((less ->> 'items_handled')::bigint, 0),
           erased = h.erased + cardinality(p_seq)
     WHERE shard = 0;
    RETURN true;
END $$;

-- The tombstones, and that somebody should read them.
CREATE FUNCTION postroom_bury(p_now timestamptz, p_names text[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO postroom_erasures AS e (subject, erased_at)
    SELECT DISTINCT postroom_subject_hash(n.name), p_now FROM unnest(p_names) AS n (name)
        ON CONFLICT (subject) DO UPDATE SET erased_at = greatest(e.erased_at, excluded.erased_at);
    NOTIFY postroom_erasures;
END $$;

-- The end: what the person is known by goes, unless bodies came since the last look (from p_event on) that may mention
-- them: these are returned. The rows of p_replies, p_letters and p_statuses go with it; p_named are the sessions of
-- others, as of groups, in which the person wrote last.
CREATE FUNCTION postroom_forget(
    p_now timestamptz, p_names text[], p_keys text[], p_needles bytea[], p_escapes bytea[], p_event bigint,
    p_named text[], p_replies bigint[], p_letters uuid[], s_number text[], s_message_id text[], p_actor text, p_detail jsonb
) RETURNS bigint[] LANGUAGE plpgsql SET enable_seqscan = off AS $$
DECLARE
    hits bigint[];
BEGIN
    PERFORM pg_advisory_xact_lock(7305, 1), pg_advisory_xact_lock(7305, 2);
    hits := ARRAY(SELECT e.event_id FROM wa_events e WHERE e.event_id >= p_event
                     AND EXISTS (SELECT FROM unnest(p_needles || p_escapes) AS n (needle)
                                  WHERE position(n.needle IN e.body) > 0)
                   ORDER BY e.event_id LIMIT 100);
    IF cardinality(hits) > 0 THEN
        RETURN hits;
    END IF;
    DELETE FROM webhook_dlq WHERE id = ANY (p_letters);
    DELETE FROM whatsapp_outbox WHERE id = ANY (p_replies);
    DELETE FROM whatsapp_outbox WHERE session_key = ANY (p_keys);
    DELETE FROM whatsapp_statuses t USING unnest(s_number, s_message_id) AS s (number, message_id)
     WHERE t.phone_number_id = s.number AND t.message_id = s.message_id;
    DELETE FROM user_sessions WHERE session_key = ANY (p_keys);
    UPDATE user_sessions SET wa_id = CASE WHEN wa_id = ANY (p_names) THEN NULL ELSE wa_id END,
                             user_id = CASE WHEN user_id = ANY (p_names) THEN NULL ELSE user_id END
     WHERE session_key = ANY (p_named);
    DELETE FROM session_names WHERE session_key = ANY (p_keys);
    PERFORM postroom_bury(p_now, p_names);
    INSERT INTO audit_log (acted_at, actor, action, object_type, object_id, detail)
    VALUES (p_now, p_actor, 'erase', 'person', postroom_subject_hash(p_names[1]), p_detail);
    RETURN NULL;
END $$;

-- As in 0008, and not while a person is being taken out of archives: who does that holds (7305, 6).
CREATE OR REPLACE FUNCTION postroom_next_archive(p_epoch bigint, p_now timestamptz, p_before timestamptz)
RETURNS SETOF postroom_archives LANGUAGE plpgsql AS $$
DECLARE
    week record;
    month record;
    outcomes text;
    chosen text;
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    IF NOT pg_try_advisory_xact_lock_shared(7305, 6) THEN
        RETURN;
    END IF;
    SELECT a.name INTO chosen FROM postroom_archives a WHERE a.state <> 'archived' ORDER BY a.from_at LIMIT 1;
    IF chosen IS NULL THEN
        FOR week IN SELECT * FROM postroom_partitions('whatsapp_messages_items') p WHERE p.until_at <= p_before LOOP
            outcomes := replace(week.name, 'whatsapp_messages', 'message_outcomes');
            IF NOT postroom_is_unfinished(week.name, outcomes, week.from_at, week.until_at) THEN
                chosen := postroom_archive_name(week.name);
                INSERT INTO postroom_archives (name, kind, partitions, from_at, until_at, state, begun_at, seqs, tallies)
                SELECT chosen, 'messages', ARRAY[week.name, outcomes], week.from_at, week.until_at, 'detaching', p_now,
                       t.seqs, t.tallies
                  FROM postroom_tally(week.name, outcomes) t;
                PERFORM postroom_take_along(week.name, outcomes, week.from_at, week.until_at);
                EXIT;
            END IF;
        END LOOP;
    END IF;
    IF chosen IS NULL THEN
        FOR month IN SELECT * FROM postroom_partitions('wa_events') p WHERE p.until_at <= p_before LOOP
            IF NOT EXISTS (SELECT FROM postroom_partitions('whatsapp_messages_items') w
                            WHERE w.from_at < month.until_at AND w.until_at > month.from_at) THEN
                chosen := postroom_archive_name(month.name);
                INSERT INTO postroom_archives (name, kind, partitions, from_at, until_at, state, begun_at)
                VALUES (chosen, 'events', ARRAY[month.name], month.from_at, month.until_at, 'detaching', p_now);
                EXIT;
            END IF;
        END LOOP;
    END IF;
    RETURN QUERY SELECT * FROM postroom_archives a WHERE a.name = chosen;
END $$;

-- As in 0008, with what was erased.
CREATE OR REPLACE FUNCTION postroom_tally(p_items text, p_outcomes text, OUT seqs int8multirange, OUT tallies jsonb)
LANGUAGE plpgsql STABLE AS $$
DECLARE
    ended jsonb;
BEGIN
    EXECUTE format(
        'SELECT coalesce(range_agg(r), ''{}''), jsonb_build_object(''items'', coalesce(sum(n), 0), '
        '''items_malformed'', coalesce(sum(malformed), 0), ''items_handled'', coalesce(sum(handled), 0), '
        '''items_erased'', coalesce(sum(erased), 0), '
        '''items_open'', coalesce(sum(n - malformed - handled - erased), 0)) FROM ('
        'SELECT int8range(min(seq), max(seq), ''[]'') AS r, count(*) AS n, '
        'count(*) FILTER (WHERE bucket = ''malformed'') AS malformed, '
        'count(*) FILTER (WHERE bucket = ''handled'') AS handled, '
        'count(*) FILTER (WHERE bucket = ''erased'') AS erased '
        'FROM (SELECT seq, bucket, seq - row_number() OVER (ORDER BY seq) AS island FROM %I) s GROUP BY island) i',
        p_items)
       INTO seqs, tallies;
    EXECUTE format(
        'SELECT coalesce(jsonb_object_agg(''outcomes_'' || outcome, n), ''{}'') '
        '|| jsonb_build_object(''outcomes'', coalesce(sum(n), 0)) '
        'FROM (SELECT outcome, count(*) AS n FROM %I GROUP BY outcome) o', p_outcomes)
       INTO ended;
    tallies := tallies || ended;
END $$;

CREATE FUNCTION postroom_archived_erased() RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT coalesce(sum((tallies ->> 'items_erased')::bigint), 0)::bigint
      FROM postroom_archived_tallies WHERE items_are_out
$$;

-- Whether a letter and its item say different things. p_outcome: of the row of the outcome, null where it is in an archive.
CREATE FUNCTION postroom_letter_is_astray(d webhook_dlq, p_outcome text) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT coalesce(p_outcome, d.item_outcome) IS NULL
        OR (d.status = 'reprocessed') <> (coalesce(p_outcome, d.item_outcome) = 'delivered')
        OR (d.resolution IS NOT DISTINCT FROM 'discarded') <> (coalesce(p_outcome, d.item_outcome) = 'discarded')
        OR (d.resolution IS NOT DISTINCT FROM 'deferred') <> (coalesce(p_outcome, d.item_outcome) = 'deferred')
$$;

-- As in 0010, also for tables with a column that is named as something here: to_jsonb(n) was that column, not the row.
CREATE OR REPLACE FUNCTION postroom_audit_rows() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
#variable_conflict use_variable
DECLARE
    keys text[] := TG_ARGV[0];
    personal text[] := TG_ARGV[1];
    ignored text[] := TG_ARGV[2];
    who text := coalesce(nullif(current_setting('postroom.actor', true), ''),
                         session_user || CASE current_setting('role') WHEN 'none' THEN ''
                                         ELSE '/' || current_setting('role') END);
    session_said text := nullif(current_setting('postroom.session', true), '');
    correlation text := nullif(current_setting('postroom.correlation_id', true), '');
    agent text := left(nullif(current_setting('postroom.user_agent', true), ''), 400);
    address inet;
BEGIN
    BEGIN
        address := coalesce(nullif(current_setting('postroom.ip', true), '')::inet, inet_client_addr());
    EXCEPTION WHEN invalid_text_representation THEN
        address := inet_client_addr();  -- what a proxy says is not worth a statement
    END;
    IF TG_OP = 'INSERT' THEN
        INSERT INTO audit_log (actor, action, object_type, object_id, changed, session, correlation_id, ip, user_agent)
        SELECT who, 'insert', TG_TABLE_NAME, e.id, e.changed, session_said, correlation, address, agent
          FROM new_rows n CROSS JOIN LATERAL postroom_audit_entry(keys, personal, ignored, NULL, to_jsonb(n.*)) e
         WHERE e.changed IS NOT NULL;
    ELSIF TG_OP = 'DELETE' THEN
        INSERT INTO audit_log (actor, action, object_type, object_id, changed, session, correlation_id, ip, user_agent)
        SELECT who, 'delete', TG_TABLE_NAME, e.id, e.changed, session_said, correlation, address, agent
          FROM old_rows o CROSS JOIN LATERAL postroom_audit_entry(keys, personal, ignored, to_jsonb(o.*), NULL) e
         WHERE e.changed IS NOT NULL;
    ELSE
        INSERT INTO audit_log (actor, action, object_type, object_id, changed, session, correlation_id, ip, user_agent)
        SELECT who, 'update', TG_TABLE_NAME, e.id, e.changed, session_said, correlation, address, agent
          FROM (SELECT to_jsonb(o.*) AS was FROM old_rows o) o
          FULL JOIN (SELECT to_jsonb(n.*) AS is_now FROM new_rows n) n
            ON ARRAY(SELECT o.was -> k FROM unnest(keys) AS k) = ARRAY(SELECT n.is_now -> k FROM unnest(keys) AS k)
         CROSS JOIN LATERAL postroom_audit_entry(keys, personal, ignored, o.was, n.is_now) e
         WHERE e.changed IS NOT NULL;
    END IF;
    RETURN NULL;
END $$;
DO $$
BEGIN
    EXECUTE format('ALTER FUNCTION postroom_audit_rows() SET search_path = %I, pg_temp', current_schema());
END $$;
