-- Archives: partitions that are past their retention leave the database for a file that was read back, and nothing else
-- does. What is in the file stays counted: the tallies of an archive stand in for its rows.

CREATE TABLE postroom_archives (
    name        text PRIMARY KEY,
    kind        text NOT NULL CHECK (kind IN ('messages', 'events')),
    partitions  text[] NOT NULL,
    from_at     timestamptz NOT NULL,
    until_at    timestamptz NOT NULL,
    state       text NOT NULL CHECK (state IN ('detaching', 'writing', 'written', 'archived')),
    location    text,
    tables      jsonb,
    seqs        int8multirange NOT NULL DEFAULT '{}',
    tallies     jsonb NOT NULL DEFAULT '{}',
    begun_at    timestamptz NOT NULL,
    archived_at timestamptz
);
CREATE INDEX postroom_archives_seqs ON postroom_archives USING gist (seqs);
COMMENT ON TABLE postroom_archives IS
    'state: detaching, the partitions are being taken out of their tables; writing, they are out and whole; written, '
    'their files were read back; archived, the files are the only place. tables: file, rows and digest of each. tallies: '
    'what the rows count for, kept up to date by replays of dead letters that are older than the files';

-- A dead letter outlives the partition of its item: it takes the key along, and where the item ended.
ALTER TABLE webhook_dlq ADD COLUMN item_key bytea, ADD COLUMN item_outcome text;
COMMENT ON COLUMN webhook_dlq.item_outcome IS 'Where the item is, once its own row is on the way to an archive';
CREATE INDEX whatsapp_outbox_created_at ON whatsapp_outbox USING brin (created_at);

INSERT INTO system_settings (name, value, minimum, maximum, description) VALUES
    ('retention_days', '30', 14, 3650, 'partitions of messages and events are archived so long after their end');
INSERT INTO postroom_jobs (name, schedule, command) VALUES
    ('archive-partitions', '30 2 * * *', 'write partitions past their retention to archives, and drop them');
INSERT INTO postroom_job_names (name, job) VALUES ('archive-partitions', 'archive-partitions');

-- As in 0001. Who stands by asks twice a second: it must not queue for the lock, behind which every completion would
-- wait, while the lease is not to be had.
CREATE OR REPLACE FUNCTION postroom_take_lease(p_holder uuid, p_ttl interval, p_locked boolean)
RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    new_epoch bigint;
BEGIN
    IF NOT EXISTS (SELECT FROM leases WHERE shard = 0 AND ((p_locked AND locked) OR holder IS NULL
                                                           OR expires_at <= clock_timestamp())) THEN
        RETURN NULL;
    END IF;
    PERFORM pg_advisory_xact_lock(7305, 2);
    UPDATE leases SET holder = p_holder, epoch = epoch + 1, expires_at = clock_timestamp() + p_ttl,
                      locked = p_locked
     WHERE shard = 0 AND ((p_locked AND locked) OR holder IS NULL OR expires_at <= clock_timestamp())
    RETURNING epoch INTO new_epoch;
    RETURN new_epoch;
END $$;

-- Partitions. What was archived is not made again: of the time before now only what a clock that is a little behind
-- may still need.

CREATE OR REPLACE FUNCTION postroom_make_partitions(p_now timestamptz, p_ahead integer)
RETURNS integer LANGUAGE plpgsql SET timezone = 'UTC' AS $$
DECLARE
    late timestamptz := p_now - interval '1 day';
    made integer := 0;
    start timestamptz;
    suffix text;
BEGIN
    PERFORM pg_advisory_xact_lock(7305, 3);
    start := date_trunc('month', late);
    WHILE start <= date_trunc('month', p_now) + make_interval(months => p_ahead) LOOP
        suffix := to_char(start, '"_y"YYYY"m"MM');
        made := made + postroom_make_partition('wa_events', 'wa_events' || suffix, start,
                                               start + interval '1 month')::integer;
        start := start + interval '1 month';
    END LOOP;
    start := date_trunc('week', late);
    WHILE start <= date_trunc('week', p_now) + make_interval(weeks => p_ahead) LOOP
        suffix := to_char(start, '"_y"IYYY"w"IW');
        made := made + postroom_make_partition('whatsapp_messages_items', 'whatsapp_messages' || suffix, start,
                                               start + interval '1 week')::integer;
        made := made + postroom_make_partition('message_outcomes', 'message_outcomes' || suffix, start,
                                               start + interval '1 week')::integer;
        start := start + interval '1 week';
    END LOOP;
    RETURN made;
END $$;

CREATE FUNCTION postroom_is_attached(p_name text) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT EXISTS (SELECT FROM pg_inherits WHERE inhrelid = to_regclass(quote_ident(p_name)) AND NOT inhdetachpending)
$$;

-- The partitions of a table with their bounds, oldest first.
CREATE FUNCTION postroom_partitions(p_parent text)
RETURNS TABLE (name text, from_at timestamptz, until_at timestamptz) LANGUAGE sql STABLE SET timezone = 'UTC' AS $$
    SELECT c.relname::text, b.bounds[1]::timestamptz, b.bounds[2]::timestamptz
      FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
     CROSS JOIN LATERAL regexp_match(pg_get_expr(c.relpartbound, c.oid), 'FROM \(''(.+)''\) TO \(''(.+)''\)')
           AS b (bounds)
     WHERE i.inhparent = to_regclass(quote_ident(p_parent)) AND NOT i.inhdetachpending
     ORDER BY 2
$$;

-- Choosing

-- Something of that week is under way: an item without an outcome, a dead letter that moves, a reply to be sent.
CREATE FUNCTION postroom_is_unfinished(p_items text, p_outcomes text, p_from timestamptz, p_until timestamptz)
RETURNS boolean LANGUAGE plpgsql STABLE AS $$
DECLARE
    found boolean;
BEGIN
    IF EXISTS (SELECT FROM webhook_dlq d WHERE d.status IN ('pending', 'processing')
                  AND d.received_at >= p_from AND d.received_at < p_until)
       OR EXISTS (SELECT FROM whatsapp_outbox o WHERE o.status = 'pending'
                     AND o.created_at >= p_from AND o.created_at < p_until) THEN
        RETURN true;
    END IF;
    EXECUTE format('SELECT EXISTS (SELECT FROM %I i WHERE i.bucket IS NULL AND NOT EXISTS '
                   '(SELECT FROM %I o WHERE o.seq = i.seq AND o.received_at = i.received_at))', p_items, p_outcomes)
       INTO found;
    RETURN found;
END $$;

-- What the rows of a week count for, and their seqs.
CREATE FUNCTION postroom_tally(p_items text, p_outcomes text, OUT seqs int8multirange, OUT tallies jsonb)
LANGUAGE plpgsql STABLE AS $$
DECLARE
    ended jsonb;
BEGIN
    EXECUTE format(
        'SELECT coalesce(range_agg(r), ''{}''), jsonb_build_object(''items'', coalesce(sum(n), 0), '
        '''items_malformed'', coalesce(sum(malformed), 0), ''items_handled'', coalesce(sum(handled), 0), '
        '''items_open'', coalesce(sum(n - malformed - handled), 0)) FROM ('
        'SELECT int8range(min(seq), max(seq), ''[]'') AS r, count(*) AS n, '
        'count(*) FILTER (WHERE bucket = ''malformed'') AS malformed, '
        'count(*) FILTER (WHERE bucket = ''handled'') AS handled '
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

-- A name that no archive has: a partition may be made again for a clock that leaps back.
CREATE FUNCTION postroom_archive_name(p_partition text) RETURNS text LANGUAGE sql STABLE AS $$
    SELECT p_partition || CASE count(*) WHEN 0 THEN '' ELSE '.' || (count(*) + 1) END
      FROM postroom_archives WHERE name = p_partition OR name LIKE replace(p_partition, '_', '\_') || '.%'
$$;

-- The archive to go on with, or the next one to begin: the oldest week or month that ended before p_before and in which
-- nothing is under way. A month of bodies goes after the weeks whose messages point into it.
CREATE FUNCTION postroom_next_archive(p_epoch bigint, p_now timestamptz, p_before timestamptz)
RETURNS SETOF postroom_archives LANGUAGE plpgsql AS $$
DECLARE
    week record;
    month record;
    outcomes text;
    chosen text;
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
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

-- How many past their time have to wait for something that is under way.
CREATE FUNCTION postroom_held_partitions(p_before timestamptz) RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT count(*) FROM postroom_partitions('whatsapp_messages_items') p WHERE p.until_at <= p_before
$$;

-- Dead letters of the week that failed and wait for an operator.
CREATE FUNCTION postroom_take_along(p_items text, p_outcomes text, p_from timestamptz, p_until timestamptz)
RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    -- Whoever moves an outcome has the letter's row first: what is read below is as the last of them left it.
    PERFORM 1 FROM webhook_dlq d WHERE d.received_at >= p_from AND d.received_at < p_until AND d.item_outcome IS NULL
      ORDER BY d.id FOR UPDATE;
    EXECUTE format('UPDATE webhook_dlq d SET item_key = i.key, item_outcome = o.outcome FROM %I i JOIN %I o '
                   'ON o.seq = i.seq AND o.received_at = i.received_at WHERE d.seq = i.seq '
                   'AND d.received_at = i.received_at AND d.received_at >= $1 AND d.received_at < $2 '
                   'AND d.item_outcome IS NULL', p_items, p_outcomes) USING p_from, p_until;
END $$;

-- Taking out. The statement that takes a partition out of its table, or goes on with one that was interrupted; null when
-- it is out. It runs by itself: it must not stand in a transaction, so it is fenced by what comes after it.
CREATE FUNCTION postroom_detach_statement(p_epoch bigint, p_partition text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    statement text;
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    SELECT format('ALTER TABLE %I DETACH PARTITION %I %s', parent.relname, p_partition,
                  CASE WHEN i.inhdetachpending THEN 'FINALIZE' ELSE 'CONCURRENTLY' END)
      INTO statement
      FROM pg_inherits i JOIN pg_class parent ON parent.oid = i.inhparent
     WHERE i.inhrelid = to_regclass(quote_ident(p_partition));
    RETURN statement;
END $$;

-- All of it is out and changes no more: what a replay moved in between is entered, and everything counted again. The
-- tables take other names, which are returned, so that theirs are free for a clock that leaps back.
CREATE FUNCTION postroom_begin_writing(p_epoch bigint, p_name text) RETURNS text[] LANGUAGE plpgsql AS $$
DECLARE
    archive postroom_archives;
    part text;
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    SELECT * INTO STRICT archive FROM postroom_archives WHERE name = p_name AND state IN ('detaching', 'writing') FOR UPDATE;
    FOREACH part IN ARRAY archive.partitions LOOP
        IF EXISTS (SELECT FROM pg_inherits WHERE inhrelid = to_regclass(quote_ident(part))) THEN
            RAISE EXCEPTION '% is still a partition', part;
        END IF;
        IF archive.state = 'detaching' THEN
            EXECUTE format('ALTER TABLE %I RENAME TO %I', part, part || '_out');
        END IF;
    END LOOP;
    IF archive.state = 'detaching' THEN
        archive.partitions := ARRAY(SELECT p.name || '_out'
                                      FROM unnest(archive.partitions) WITH ORDINALITY AS p (name, pos) ORDER BY p.pos);
    END IF;
    IF archive.kind = 'messages' AND archive.state = 'detaching' THEN
        PERFORM postroom_take_along(archive.partitions[1], archive.partitions[2], archive.from_at, archive.until_at);
        EXECUTE format('UPDATE %I o SET outcome = d.item_outcome FROM webhook_dlq d WHERE d.seq = o.seq '
                       'AND d.received_at = o.received_at AND d.item_outcome <> o.outcome', archive.partitions[2]);
        UPDATE postroom_archives a SET seqs = t.seqs, tallies = t.tallies
          FROM postroom_tally(archive.partitions[1], archive.partitions[2]) t WHERE a.name = p_name;
    END IF;
    UPDATE postroom_archives SET state = 'writing', partitions = archive.partitions WHERE name = p_name;
    RETURN archive.partitions;
END $$;

-- What was written is not what is there any more, as after replies of a clock that leapt back: it is written again.
CREATE FUNCTION postroom_write_again(p_epoch bigint, p_name text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    UPDATE postroom_archives SET state = 'writing' WHERE name = p_name AND state = 'written';
END $$;

-- Reading what is to be written, in pages by key. Nothing of it changes any more.

CREATE FUNCTION postroom_items_page(p_table text, p_after bigint, p_limit integer)
RETURNS SETOF whatsapp_messages_items LANGUAGE plpgsql STABLE SET enable_seqscan = off AS $$
BEGIN
    RETURN QUERY EXECUTE format('SELECT * FROM %I WHERE seq > $1 ORDER BY seq LIMIT $2', p_table) USING p_after, p_limit;
END $$;

CREATE FUNCTION postroom_outcomes_page(p_table text, p_after bigint, p_limit integer)
RETURNS SETOF message_outcomes LANGUAGE plpgsql STABLE SET enable_seqscan = off AS $$
BEGIN
    RETURN QUERY EXECUTE format('SELECT * FROM %I WHERE seq > $1 ORDER BY seq LIMIT $2', p_table) USING p_after, p_limit;
END $$;

-- Bodies of a month that was taken out: as many as come to p_bytes.
CREATE FUNCTION postroom_events_page(p_table text, p_after bigint, p_limit integer, p_bytes bigint)
RETURNS SETOF wa_events LANGUAGE plpgsql STABLE SET enable_seqscan = off AS $$
DECLARE
    last bigint;
BEGIN
    EXECUTE format('SELECT max(event_id) FROM (SELECT event_id, sum(size) OVER (ORDER BY event_id) - size AS before '
                   'FROM (SELECT event_id, octet_length(body) AS size FROM %I WHERE event_id > $1 '
                   'ORDER BY event_id LIMIT $2) s) t WHERE before < $3', p_table)
       INTO last USING p_after, p_limit, p_bytes;
    RETURN QUERY EXECUTE format('SELECT * FROM %I WHERE event_id > $1 AND event_id <= $2 ORDER BY event_id', p_table)
        USING p_after, last;
END $$;

-- Bodies of a week, which are still where they were.
CREATE FUNCTION postroom_bodies_page(
    p_from timestamptz, p_until timestamptz, p_after bigint, p_limit integer, p_bytes bigint
) RETURNS SETOF wa_events LANGUAGE sql STABLE AS $$
    WITH page AS (
        SELECT event_id, sum(size) OVER (ORDER BY event_id) - size AS before
          FROM (SELECT event_id, octet_length(body) AS size FROM wa_events
                 WHERE received_at >= p_from AND received_at < p_until AND event_id > p_after
                 ORDER BY event_id LIMIT p_limit) s
    )
    SELECT e.* FROM wa_events e
     WHERE e.received_at >= p_from AND e.received_at < p_until AND e.event_id > p_after
       AND e.event_id <= (SELECT max(event_id) FROM page WHERE before < p_bytes)
     ORDER BY e.event_id
$$;

CREATE FUNCTION postroom_replies_page(p_from timestamptz, p_until timestamptz, p_after bigint, p_limit integer)
RETURNS SETOF whatsapp_outbox LANGUAGE sql STABLE AS $$
    SELECT * FROM whatsapp_outbox WHERE created_at >= p_from AND created_at < p_until AND id > p_after
     ORDER BY id LIMIT p_limit
$$;

-- The columns of a table, as they are written to an archive.
CREATE FUNCTION postroom_columns(p_table text) RETURNS TABLE (name text, type text) LANGUAGE sql STABLE AS $$
    SELECT attname::text, format_type(atttypid, atttypmod) FROM pg_attribute
     WHERE attrelid = to_regclass(quote_ident(p_table)) AND attnum > 0 AND NOT attisdropped ORDER BY attnum
$$;

CREATE FUNCTION postroom_archive_written(p_epoch bigint, p_name text, p_location text, p_tables jsonb)
RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    UPDATE postroom_archives SET state = 'written', location = p_location, tables = p_tables
     WHERE name = p_name AND state = 'writing';
    IF NOT FOUND THEN
        RAISE EXCEPTION 'archive % is not being written', p_name;
    END IF;
END $$;

-- The rows of a table that p_tables says were written; the same again as are dropped.
CREATE FUNCTION postroom_require_rows(p_table text, p_counted bigint, p_written jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF p_counted IS DISTINCT FROM (p_written ->> 'rows')::bigint THEN
        RAISE EXCEPTION '% has % rows, its archive %', p_table, p_counted, p_written ->> 'rows';
    END IF;
END $$;

-- The end: what was read back goes, all of it in one transaction.
CREATE FUNCTION postroom_drop_archived(p_epoch bigint, p_now timestamptz, p_name text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    archive postroom_archives;
    names text[];
    counted bigint;
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    SELECT * INTO STRICT archive FROM postroom_archives WHERE name = p_name AND state = 'written' FOR UPDATE;
    names := CASE archive.kind WHEN 'messages' THEN ARRAY['items', 'outcomes'] ELSE ARRAY['events'] END;
    FOR n IN 1 .. cardinality(names) LOOP
        EXECUTE format('SELECT count(*) FROM %I', archive.partitions[n]) INTO counted;
        PERFORM postroom_require_rows(archive.partitions[n], counted, archive.tables -> names[n]);
        EXECUTE format('DROP TABLE %I', archive.partitions[n]);
    END LOOP;
    IF archive.kind = 'messages' THEN
        DELETE FROM whatsapp_outbox WHERE created_at >= archive.from_at AND created_at < archive.until_at;
        GET DIAGNOSTICS counted = ROW_COUNT;
        PERFORM postroom_require_rows('whatsapp_outbox', counted, archive.tables -> 'replies');
    END IF;
    UPDATE postroom_archives SET state = 'archived', archived_at = p_now WHERE name = p_name;
END $$;

-- What is in archives, or on the way there, counts as if it were in its table.
CREATE VIEW postroom_archived_tallies WITH (security_invoker = true) AS
SELECT a.name, a.seqs, a.tallies, a.state = 'archived' OR NOT postroom_is_attached(a.partitions[1]) AS items_are_out,
       a.state = 'archived' OR NOT postroom_is_attached(a.partitions[2]) AS outcomes_are_out
  FROM postroom_archives a WHERE a.kind = 'messages';

CREATE FUNCTION postroom_archived_sums(
    OUT items bigint, OUT items_malformed bigint, OUT items_handled bigint, OUT items_open bigint,
    OUT outcomes bigint, OUT outcomes_handled bigint, OUT outcomes_delivered bigint, OUT outcomes_rejected bigint,
    OUT outcomes_dead_letter bigint, OUT outcomes_deferred bigint, OUT outcomes_discarded bigint
) LANGUAGE sql STABLE AS $$
    SELECT sum(n) FILTER (WHERE name = 'items'), sum(n) FILTER (WHERE name = 'items_malformed'),
           sum(n) FILTER (WHERE name = 'items_handled'), sum(n) FILTER (WHERE name = 'items_open'),
           sum(n) FILTER (WHERE name = 'outcomes'), sum(n) FILTER (WHERE name = 'outcomes_handled'),
           sum(n) FILTER (WHERE name = 'outcomes_delivered'), sum(n) FILTER (WHERE name = 'outcomes_rejected'),
           sum(n) FILTER (WHERE name = 'outcomes_dead_letter'), sum(n) FILTER (WHERE name = 'outcomes_deferred'),
           sum(n) FILTER (WHERE name = 'outcomes_discarded')
      FROM (SELECT name, 0::bigint AS n
              FROM unnest('{items,items_malformed,items_handled,items_open,outcomes,outcomes_handled,outcomes_delivered,'
                          'outcomes_rejected,outcomes_dead_letter,outcomes_deferred,outcomes_discarded}'::text[])
                   AS z (name)
             UNION ALL
            SELECT e.key, e.value::bigint FROM postroom_archived_tallies t
             CROSS JOIN LATERAL jsonb_each_text(t.tallies) AS e (key, value)
             WHERE CASE WHEN e.key LIKE 'outcomes%' THEN t.outcomes_are_out ELSE t.items_are_out END) s
$$;

-- As in 0003, also for letters whose items are in an archive or on the way there.
CREATE OR REPLACE FUNCTION postroom_move_outcomes(p_now timestamptz, p_epoch bigint, p_letters uuid[], p_outcome text)
RETURNS uuid[] LANGUAGE plpgsql AS $$
DECLARE
    moved record;
    kept record;
    ids uuid[];
BEGIN
    WITH before AS (
        SELECT d.id, o.seq, o.received_at, o.outcome FROM webhook_dlq d
          JOIN message_outcomes o ON o.seq = d.seq AND o.received_at = d.received_at
         WHERE d.id = ANY (p_letters) AND o.outcome <> p_outcome
           FOR UPDATE OF o
    ), after AS (
        UPDATE message_outcomes o
           SET outcome = p_outcome, completed_at = p_now, epoch = coalesce(p_epoch, o.epoch)
          FROM before b
         WHERE o.seq = b.seq AND o.received_at = b.received_at
        RETURNING b.id, b.outcome AS before
    )
    SELECT array_agg(id) AS ids, count(*) AS items,
           count(*) FILTER (WHERE before = 'delivered') AS delivered,
           count(*) FILTER (WHERE before = 'rejected') AS rejected,
           count(*) FILTER (WHERE before = 'dead_letter') AS dead_letter,
           count(*) FILTER (WHERE before = 'deferred') AS deferred,
           count(*) FILTER (WHERE before = 'discarded') AS discarded
      INTO moved FROM after;
    IF moved.items > 0 THEN
        PERFORM postroom_move_tallies(p_outcome, moved.delivered, moved.rejected, moved.dead_letter, moved.deferred,
                                      moved.discarded);
    END IF;
    ids := moved.ids;
    -- In the order in which completions take these rows.
    IF EXISTS (SELECT FROM webhook_dlq d WHERE d.id = ANY (p_letters) AND d.item_outcome <> p_outcome) THEN
        PERFORM 1 FROM delivery_tallies WHERE shard = 0 FOR UPDATE;
    END IF;
    FOR kept IN
        SELECT d.id, d.seq, d.item_outcome AS before FROM webhook_dlq d
         WHERE d.id = ANY (p_letters) AND d.item_outcome <> p_outcome
         ORDER BY d.seq FOR UPDATE OF d
    LOOP
        UPDATE webhook_dlq SET item_outcome = p_outcome WHERE id = kept.id;
        UPDATE postroom_archives a
           SET tallies = a.tallies || jsonb_build_object(
                   'outcomes_' || kept.before, (a.tallies ->> ('outcomes_' || kept.before))::bigint - 1,
                   'outcomes_' || p_outcome, coalesce((a.tallies ->> ('outcomes_' || p_outcome))::bigint, 0) + 1)
         WHERE a.seqs @> kept.seq;
        -- Where the row of the outcome is still there, it was moved above, and the tallies with it.
        IF kept.id <> ALL (coalesce(moved.ids, '{}')) THEN
            PERFORM postroom_move_tallies(
                p_outcome, (kept.before = 'delivered')::int, (kept.before = 'rejected')::int,
                (kept.before = 'dead_letter')::int, (kept.before = 'deferred')::int, (kept.before = 'discarded')::int);
            ids := ids || kept.id;
        END IF;
    END LOOP;
    RETURN ids;
END $$;

-- So many items were there and there, and are all at p_outcome now.
CREATE FUNCTION postroom_move_tallies(
    p_outcome text, p_delivered bigint, p_rejected bigint, p_dead_letter bigint, p_deferred bigint, p_discarded bigint
) RETURNS void LANGUAGE sql AS $$
    UPDATE delivery_tallies t
       SET delivered = t.delivered - p_delivered + (p_outcome = 'delivered')::int * moved.items,
           rejected = t.rejected - p_rejected + (p_outcome = 'rejected')::int * moved.items,
           dead_letter = t.dead_letter - p_dead_letter + (p_outcome = 'dead_letter')::int * moved.items,
           deferred = t.deferred - p_deferred + (p_outcome = 'deferred')::int * moved.items,
           discarded = t.discarded - p_discarded + (p_outcome = 'discarded')::int * moved.items
      FROM (SELECT p_delivered + p_rejected + p_dead_letter + p_deferred + p_discarded AS items) moved
     WHERE t.shard = 0
$$;

-- Reading back. The tables of an archive are made in a schema of their own: no partition, and no concern of the router's.
CREATE FUNCTION postroom_make_restored(p_schema text, p_table text, p_columns text[], p_types text[])
RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('CREATE SCHEMA IF NOT EXISTS %I', p_schema);
    EXECUTE format('CREATE TABLE %I.%I (%s)', p_schema, p_table,
                   (SELECT string_agg(format('%I %s', c.name, c.type), ', ' ORDER BY c.pos)
                      FROM unnest(p_columns, p_types) WITH ORDINALITY AS c (name, type, pos)));
END $$;
