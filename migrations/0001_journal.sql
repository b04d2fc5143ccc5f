-- The journal: raw deliveries, their items, the dedup ledger, and who may write and deliver.
-- Rows in partitions are never updated but for an operator's replay; what changes stands in small tables.

CREATE TABLE postroom_keys (
    name  text PRIMARY KEY,
    value bytea NOT NULL
);
COMMENT ON TABLE postroom_keys IS 'Keys made at migration and kept here, as the one of the dedup ledger';
INSERT INTO postroom_keys (name, value)
VALUES ('dedup', decode(replace(gen_random_uuid()::text || gen_random_uuid()::text, '-', ''), 'hex'));

-- One row a shard. next_seq and next_event have no gaps: a row that is missing shows.
CREATE TABLE journal_head (
    shard      smallint PRIMARY KEY,
    next_seq   bigint NOT NULL DEFAULT 1,
    next_event bigint NOT NULL DEFAULT 1,
    received   bigint NOT NULL DEFAULT 0,
    duplicates bigint NOT NULL DEFAULT 0,
    malformed  bigint NOT NULL DEFAULT 0,
    handled    bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 20, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
COMMENT ON TABLE journal_head IS 'Counters and tallies of what was received, written by the flush they count';
INSERT INTO journal_head (shard) VALUES (0);

-- Each process that journals has one row and one flush in flight; the number of the last committed
-- flush resolves a commit whose answer was lost.
CREATE TABLE journal_writers (
    writer     uuid PRIMARY KEY,
    flush      bigint NOT NULL DEFAULT 0,
    started_at timestamptz NOT NULL
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

CREATE TABLE wa_events (
    event_id       bigint NOT NULL,
    received_at    timestamptz NOT NULL,
    app            text NOT NULL,
    correlation_id text NOT NULL,
    traceparent    text,
    partial        boolean NOT NULL,
    body           bytea NOT NULL,
    PRIMARY KEY (event_id, received_at)
) PARTITION BY RANGE (received_at);
COMMENT ON TABLE wa_events IS 'Signed bodies, byte for byte; partial: items that were duplicates were cut out';

CREATE TABLE whatsapp_messages_items (
    seq             bigint NOT NULL,
    received_at     timestamptz NOT NULL,
    event_id        bigint NOT NULL,
    key             bytea NOT NULL,
    kind            "char" NOT NULL,
    path            text NOT NULL,
    message_id      text,
    phone_number_id text,
    session_key     text,
    type            text,
    bucket          text,
    reason          text,
    joins           text,
    PRIMARY KEY (seq, received_at)
) PARTITION BY RANGE (received_at);
COMMENT ON TABLE whatsapp_messages_items IS
    'Every item of every body in journal order. kind: m message, s status, e error, c other change, b body. '
    'path: entry.change.list+index, as 0.0.m3. Its bytes stand in wa_events';

CREATE TABLE message_outcomes (
    seq          bigint NOT NULL,
    received_at  timestamptz NOT NULL,
    completed_at timestamptz NOT NULL,
    epoch        bigint NOT NULL,
    attempts     integer NOT NULL,
    outcome      text NOT NULL CHECK (outcome IN ('handled', 'delivered', 'rejected', 'dead_letter', 'discarded')),
    service      text,
    rule         text,
    PRIMARY KEY (seq, received_at)
) PARTITION BY RANGE (received_at);

-- Unfinished items below the low-water mark; everything else below it is finished.
CREATE TABLE journal_stragglers (
    seq bigint PRIMARY KEY
);

CREATE TABLE dedup_ledger_0 (key bytea PRIMARY KEY, seq bigint NOT NULL);
CREATE TABLE dedup_ledger_1 (key bytea PRIMARY KEY, seq bigint NOT NULL);
CREATE TABLE dedup_generation (
    shard      smallint PRIMARY KEY,
    current    smallint NOT NULL CHECK (current IN (0, 1)),
    rotated_at timestamptz NOT NULL DEFAULT now()
);
INSERT INTO dedup_generation (shard, current) VALUES (0, 0);

-- What a sender is known by, per number. The key that was given first is never computed again.
CREATE TABLE session_names (
    phone_number_id text NOT NULL,
    name            text NOT NULL,
    session_key     text NOT NULL,
    since           bigint NOT NULL,
    PRIMARY KEY (phone_number_id, name)
);
CREATE INDEX session_names_session_key ON session_names (session_key);

CREATE TABLE user_sessions (
    session_key      text PRIMARY KEY,
    phone_number_id  text NOT NULL,
    wa_id            text,
    user_id          text,
    active_service   text,
    state            jsonb NOT NULL DEFAULT '{}',
    version          bigint NOT NULL,
    last_interaction timestamptz NOT NULL,
    created_at       timestamptz NOT NULL
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05);

CREATE TABLE whatsapp_statuses (
    phone_number_id text NOT NULL,
    message_id      text NOT NULL,
    status          text NOT NULL,
    rank            smallint NOT NULL,
    status_at       timestamptz,
    recorded_at     timestamptz NOT NULL,
    PRIMARY KEY (phone_number_id, message_id)
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05);
COMMENT ON TABLE whatsapp_statuses IS 'The furthest status of each outbound message; it only moves forward';

CREATE TABLE whatsapp_outbox (
    id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    seq             bigint NOT NULL,
    ordinal         integer NOT NULL,
    session_key     text NOT NULL,
    phone_number_id text NOT NULL,
    recipient       text,
    service         text,
    payload         jsonb NOT NULL,
    status          text NOT NULL CHECK (status IN ('unsent')),
    correlation_id  text NOT NULL,
    created_at      timestamptz NOT NULL
);
CREATE INDEX whatsapp_outbox_session_key ON whatsapp_outbox (session_key, id);

CREATE TABLE webhook_dlq (
    id                 uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    phone_number       text,
    service            text NOT NULL,
    payload            jsonb NOT NULL,
    error_message      text NOT NULL,
    retry_count        integer NOT NULL DEFAULT 0,
    status             text NOT NULL CHECK (status IN ('pending', 'processing', 'reprocessed', 'failed')),
    resolution         text CHECK (resolution IN ('exhausted', 'rejected', 'discarded', 'no_service', 'reprocessed')),
    next_retry_at      timestamptz,
    created_at         timestamptz NOT NULL,
    updated_at         timestamptz NOT NULL,
    seq                bigint NOT NULL UNIQUE,
    received_at        timestamptz NOT NULL,
    message_id         text,
    session_key        text NOT NULL,
    attempts           integer NOT NULL,
    revision           integer NOT NULL DEFAULT 0,
    correlation_id     text NOT NULL,
    retry_requested_at timestamptz,
    claimed_epoch      bigint
) WITH (autovacuum_vacuum_scale_factor = 0.05);
CREATE INDEX idx_webhook_dlq_status ON webhook_dlq (status);
CREATE INDEX idx_webhook_dlq_next_retry ON webhook_dlq (next_retry_at) WHERE status = 'pending';
CREATE INDEX idx_webhook_dlq_service ON webhook_dlq (service);
CREATE INDEX idx_webhook_dlq_created_at ON webhook_dlq (created_at);

CREATE TABLE delivery_tallies (
    shard             smallint PRIMARY KEY,
    low_water         bigint NOT NULL DEFAULT 1,
    handled           bigint NOT NULL DEFAULT 0,
    delivered         bigint NOT NULL DEFAULT 0,
    rejected          bigint NOT NULL DEFAULT 0,
    dead_letter       bigint NOT NULL DEFAULT 0,
    discarded         bigint NOT NULL DEFAULT 0,
    unreadable_answer bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 20, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
COMMENT ON TABLE delivery_tallies IS 'Where items ended, written by the completion that they count; and the low-water mark';
INSERT INTO delivery_tallies (shard) VALUES (0);

CREATE TABLE leases (
    shard      smallint PRIMARY KEY,
    holder     uuid,
    epoch      bigint NOT NULL DEFAULT 0,
    expires_at timestamptz NOT NULL DEFAULT '-infinity',
    locked     boolean NOT NULL DEFAULT false
) WITH (fillfactor = 20, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
COMMENT ON TABLE leases IS 'Who delivers. Every completion is refused unless its epoch is the one here. '
    'locked: the holder''s database session holds the session lock';
INSERT INTO leases (shard) VALUES (0);

CREATE TABLE whatsapp_home_menu_items (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    country     text,
    language    text NOT NULL,
    position    integer NOT NULL,
    domain      text NOT NULL,
    title       text NOT NULL CHECK (length(title) BETWEEN 1 AND 24),
    description text CHECK (length(description) <= 72),
    active      boolean NOT NULL DEFAULT true
);
COMMENT ON TABLE whatsapp_home_menu_items IS
    'Rows of the home menu. country: ISO 3166 code, or null for every country without rows of its own. '
    'The lengths are those of a list row in the WhatsApp Cloud API';
INSERT INTO whatsapp_home_menu_items (language, position, domain, title) VALUES
    ('en', 1, 'rides', 'Rides'), ('en', 2, 'insurance', 'Insurance'), ('en', 3, 'jobs', 'Jobs'),
    ('en', 4, 'property', 'Property'), ('en', 5, 'wallet', 'Wallet'), ('en', 6, 'marketplace', 'Marketplace'),
    ('en', 7, 'ai_agents', 'Ask an assistant'), ('en', 8, 'profile', 'My profile'),
    ('fr', 1, 'rides', 'Trajets'), ('fr', 2, 'insurance', 'Assurance'), ('fr', 3, 'jobs', 'Emplois'),
    ('fr', 4, 'property', 'Immobilier'), ('fr', 5, 'wallet', 'Portefeuille'), ('fr', 6, 'marketplace', 'Marché'),
    ('fr', 7, 'ai_agents', 'Assistant'), ('fr', 8, 'profile', 'Mon profil'),
    ('rw', 1, 'rides', 'Ingendo'), ('rw', 2, 'insurance', 'Ubwishingizi'), ('rw', 3, 'jobs', 'Akazi'),
    ('rw', 4, 'property', 'Inzu'), ('rw', 5, 'wallet', 'Ikofi'), ('rw', 6, 'marketplace', 'Isoko'),
    ('rw', 7, 'ai_agents', 'Umufasha'), ('rw', 8, 'profile', 'Umwirondoro'),
    ('sw', 1, 'rides', 'Safari'), ('sw', 2, 'insurance', 'Bima'), ('sw', 3, 'jobs', 'Kazi'),
    ('sw', 4, 'property', 'Nyumba'), ('sw', 5, 'wallet', 'Pochi'), ('sw', 6, 'marketplace', 'Soko'),
    ('sw', 7, 'ai_agents', 'Msaidizi'), ('sw', 8, 'profile', 'Wasifu');

-- Partitions: made as plain tables and attached, which blocks no insert. There is no default partition.

CREATE FUNCTION postroom_make_partition(p_parent text, p_name text, p_from timestamptz, p_to timestamptz)
RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    IF to_regclass(p_name) IS NOT NULL THEN
        RETURN false;
    END IF;
    EXECUTE format('CREATE TABLE %I (LIKE %I INCLUDING DEFAULTS INCLUDING CONSTRAINTS) '
                   'WITH (autovacuum_vacuum_insert_scale_factor = 0.1, autovacuum_analyze_scale_factor = 0.05)',
                   p_name, p_parent);
    EXECUTE format('ALTER TABLE %I ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
                   p_parent, p_name, p_from, p_to);
    RETURN true;
END $$;

-- Makes what is missing from the week and month before p_now to p_ahead of them after it; returns how many.
-- The one before is for a process whose clock is a little behind.
CREATE FUNCTION postroom_make_partitions(p_now timestamptz, p_ahead integer)
RETURNS integer LANGUAGE plpgsql SET timezone = 'UTC' AS $$
DECLARE
    made integer := 0;
    start timestamptz;
    suffix text;
BEGIN
    PERFORM pg_advisory_xact_lock(7305, 3);
    FOR n IN -1 .. p_ahead LOOP
        start := date_trunc('month', p_now) + make_interval(months => n);
        suffix := to_char(start, '"_y"YYYY"m"MM');
        made := made + postroom_make_partition('wa_events', 'wa_events' || suffix, start,
                                               start + interval '1 month')::integer;
        start := date_trunc('week', p_now) + make_interval(weeks => n);
        suffix := to_char(start, '"_y"IYYY"w"IW');
        made := made + postroom_make_partition('whatsapp_messages_items', 'whatsapp_messages' || suffix, start,
                                               start + interval '1 week')::integer;
        made := made + postroom_make_partition('message_outcomes', 'message_outcomes' || suffix, start,
                                               start + interval '1 week')::integer;
    END LOOP;
    RETURN made;
END $$;

-- For operators: by hand, or from a job of their own.
CREATE FUNCTION create_wa_events_partition() RETURNS integer LANGUAGE sql AS $$
    SELECT postroom_make_partitions(clock_timestamp(), 4)
$$;

-- The ledger's rotation. A flush holds (7305, 1) to its commit, so none is under way here.
CREATE FUNCTION postroom_rotate_dedup_ledger(p_now timestamptz, p_every interval)
RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    generation dedup_generation;
BEGIN
    PERFORM pg_advisory_xact_lock(7305, 1);
    SELECT * INTO generation FROM dedup_generation WHERE shard = 0;
    IF generation.rotated_at + p_every > p_now THEN
        RETURN false;
    END IF;
    IF generation.current = 0 THEN
        TRUNCATE dedup_ledger_1;
    ELSE
        TRUNCATE dedup_ledger_0;
    END IF;
    UPDATE dedup_generation SET current = 1 - current, rotated_at = p_now WHERE shard = 0;
    RETURN true;
END $$;

-- What a flush hands over: one value for each body and each item. The statement reads them more cheaply
-- than one array for each column.
CREATE TYPE postroom_event AS (app text, correlation text, trace text, partial boolean, body bytea);
CREATE TYPE postroom_item AS (
    event integer, key bytea, dedup boolean, kind text, path text, message_id text, number text, name text,
    other text, type text, bucket text, reason text
);

-- The flush. One statement is one transaction: dedup, ledger, events, items, sessions' names and tallies.
-- With duplicates nothing is written and their positions (from 1) come back: the caller cuts them out.
-- enable_seqscan: a session keeps its plans, and one made while the ledger was empty would read all of it
-- at each flush until statistics are gathered again. force_generic_plan: a plan made anew for the length of
-- each flush's arrays is the same plan, and costs a lone message a fifth of its time.
CREATE FUNCTION postroom_append(
    p_writer uuid, p_flush bigint, p_now timestamptz, p_notify boolean,
    p_duplicates bigint, p_malformed bigint, p_handled bigint,
    p_events postroom_event[], p_items postroom_item[],
    s_number text[], s_message_id text[], s_status text[], s_rank smallint[], s_at timestamptz[],
    OUT first_seq bigint, OUT dup_positions integer[], OUT dup_seqs bigint[], OUT session_keys text[],
    OUT join_positions integer[], OUT join_keys text[]
) LANGUAGE plpgsql SET enable_seqscan = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    n_items  integer := coalesce(cardinality(p_items), 0);
    n_events integer := coalesce(cardinality(p_events), 0);
    first_event bigint;
    other_keys text[];
    joined text[];
    keys bytea[] := ARRAY(SELECT i.key FROM unnest(p_items) AS i WHERE i.dedup);
    pos integer;
    item postroom_item;
    known record;
BEGIN
    -- Held to the commit: the order of seqs is the order of commits, in all processes.
    PERFORM pg_advisory_xact_lock(7305, 1);

    -- Nearly always nothing is known, which one scan of each ledger with all keys tells cheapest.
    IF EXISTS (SELECT FROM dedup_ledger_0 WHERE key = ANY (keys))
       OR EXISTS (SELECT FROM dedup_ledger_1 WHERE key = ANY (keys)) THEN
        SELECT array_agg(hit.pos ORDER BY hit.pos), array_agg(hit.seq ORDER BY hit.pos)
          INTO dup_positions, dup_seqs
          FROM (SELECT i.ordinality::integer AS pos,
                       coalesce((SELECT l.seq FROM dedup_ledger_0 l WHERE l.key = i.key),
                                (SELECT l.seq FROM dedup_ledger_1 l WHERE l.key = i.key)) AS seq
                  FROM unnest(p_items) WITH ORDINALITY AS i
                 WHERE i.dedup) hit
         WHERE hit.seq IS NOT NULL;
        IF dup_positions IS NOT NULL THEN
            RETURN;
        END IF;
    END IF;

    UPDATE journal_writers SET flush = p_flush WHERE writer = p_writer AND flush < p_flush;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'flush % of this writer was given up', p_flush USING ERRCODE = 'PR001';
    END IF;

    UPDATE journal_head h
       SET next_seq = next_seq + n_items, next_event = next_event + n_events,
           received = received + n_items + p_duplicates, duplicates = duplicates + p_duplicates,
           malformed = malformed + p_malformed, handled = handled + p_handled
     WHERE shard = 0
    RETURNING next_seq - n_items, next_event - n_events INTO first_seq, first_event;
    IF n_items = 0 THEN
        RETURN;
    END IF;

    IF (SELECT current FROM dedup_generation WHERE shard = 0) = 0 THEN
        INSERT INTO dedup_ledger_0 (key, seq)
        SELECT i.key, first_seq + i.ordinality - 1
          FROM unnest(p_items) WITH ORDINALITY AS i
         WHERE i.dedup;
    ELSE
        INSERT INTO dedup_ledger_1 (key, seq)
        SELECT i.key, first_seq + i.ordinality - 1
          FROM unnest(p_items) WITH ORDINALITY AS i
         WHERE i.dedup;
    END IF;

    SELECT array_agg((SELECT n.session_key FROM session_names n
                       WHERE n.phone_number_id = i.number AND n.name = i.name) ORDER BY i.ordinality),
           array_agg(CASE WHEN i.other IS NOT NULL THEN
                      (SELECT n.session_key FROM session_names n
                        WHERE n.phone_number_id = i.number AND n.name = i.other) END
                     ORDER BY i.ordinality)
      INTO session_keys, other_keys
      FROM unnest(p_items) WITH ORDINALITY AS i;

    -- Who is new, or known by one name only, or by two as two people.
    FOR pos IN SELECT u.pos FROM ROWS FROM (unnest(p_items), unnest(session_keys), unnest(other_keys))
                      WITH ORDINALITY AS u (event, hash, dedup, kind, path, message_id, number, name, other,
                                             type, bucket, reason, key, other_key, pos)
                WHERE u.name IS NOT NULL
                  AND (u.key IS NULL OR (u.other IS NOT NULL AND u.other_key IS DISTINCT FROM u.key))
                ORDER BY u.pos
    LOOP
        item := p_items[pos];
        SELECT (SELECT n.session_key FROM session_names n
                 WHERE n.phone_number_id = item.number AND n.name = item.name) AS key,
               (SELECT n.session_key FROM session_names n
                 WHERE n.phone_number_id = item.number AND n.name = item.other) AS other
          INTO known;
        IF known.key IS NOT NULL AND known.other IS NOT NULL AND known.key <> known.other THEN
            -- Two conversations turn out to be one person's: the older key stays, the younger one's
            -- items before this one are finished first.
            SELECT array_agg(k.session_key ORDER BY k.since, k.session_key) INTO joined
              FROM (SELECT session_key, min(since) AS since FROM session_names
                     WHERE session_key IN (known.key, known.other) GROUP BY session_key) k;
            UPDATE session_names SET session_key = joined[1] WHERE session_key = joined[2];
            join_positions := join_positions || pos;
            join_keys := join_keys || joined[2];
            FOR later IN pos .. n_items LOOP
                IF session_keys[later] = joined[2] THEN
                    session_keys[later] := joined[1];
                END IF;
            END LOOP;
            session_keys[pos] := joined[1];
        ELSE
            session_keys[pos] := coalesce(known.key, known.other, item.number || ':' || item.name);
            INSERT INTO session_names (phone_number_id, name, session_key, since)
            SELECT item.number, n.name, session_keys[pos], first_seq + pos - 1
              FROM unnest(ARRAY[item.name, item.other]) AS n (name)
             WHERE n.name IS NOT NULL
                ON CONFLICT DO NOTHING;
        END IF;
    END LOOP;

    INSERT INTO wa_events (event_id, received_at, app, correlation_id, traceparent, partial, body)
    SELECT first_event + e.pos - 1, p_now, e.app, e.correlation, e.trace, e.partial, e.body
      FROM unnest(p_events) WITH ORDINALITY AS e (app, correlation, trace, partial, body, pos);

    INSERT INTO whatsapp_messages_items
           (seq, received_at, event_id, key, kind, path, message_id, phone_number_id, session_key, type,
            bucket, reason, joins)
    SELECT first_seq + i.pos - 1, p_now, first_event + i.event - 1, i.key, i.kind::"char", i.path, i.message_id,
           i.number, i.session_key, i.type, i.bucket, i.reason,
           CASE WHEN join_positions IS NOT NULL
                THEN join_keys[array_position(join_positions, i.pos::integer)] END
      FROM ROWS FROM (unnest(p_items), unnest(session_keys)) WITH ORDINALITY
           AS i (event, key, dedup, kind, path, message_id, number, name, other, type, bucket, reason,
                 session_key, pos);

    IF cardinality(s_message_id) > 0 THEN
        INSERT INTO whatsapp_statuses AS stored (phone_number_id, message_id, status, rank, status_at, recorded_at)
        SELECT s.number, s.message_id, s.status, s.rank, s.at, p_now
          FROM unnest(s_number, s_message_id, s_status, s_rank, s_at) AS s (number, message_id, status, rank, at)
            ON CONFLICT (phone_number_id, message_id) DO UPDATE
           SET status = excluded.status, rank = excluded.rank, status_at = excluded.status_at,
               recorded_at = excluded.recorded_at
         WHERE stored.rank < excluded.rank;
    END IF;

    IF p_notify THEN
        NOTIFY postroom_journal;
    END IF;
END $$;

-- Takes a commit whose answer was lost out of doubt: true, the flush was committed; false, it was not
-- and never will be, because its number is used up here. A flush still running in the server holds the
-- lock or the row, so this waits for it.
CREATE FUNCTION postroom_resolve_flush(p_writer uuid, p_flush bigint) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    UPDATE journal_writers SET flush = p_flush WHERE writer = p_writer AND flush < p_flush;
    RETURN NOT FOUND;
END $$;

-- The lease. Taken when it has run out, or when the taker got the session lock (p_locked) that the holder
-- had: the holder's database session has ended then. Of a holder that never had it, as after one that
-- stood still, the lock says nothing. Returns the epoch, or null. Completions hold (7305, 2) shared, so
-- none of the old epoch is under way when the new one begins.
CREATE FUNCTION postroom_take_lease(p_holder uuid, p_ttl interval, p_locked boolean)
RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    new_epoch bigint;
BEGIN
    PERFORM pg_advisory_xact_lock(7305, 2);
    UPDATE leases SET holder = p_holder, epoch = epoch + 1, expires_at = clock_timestamp() + p_ttl,
                      locked = p_locked
     WHERE shard = 0 AND ((p_locked AND locked) OR holder IS NULL OR expires_at <= clock_timestamp())
    RETURNING epoch INTO new_epoch;
    RETURN new_epoch;
END $$;

CREATE FUNCTION postroom_renew_lease(p_epoch bigint, p_ttl interval, p_locked boolean DEFAULT false)
RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    UPDATE leases SET expires_at = clock_timestamp() + p_ttl, locked = p_locked
     WHERE shard = 0 AND epoch = p_epoch;
    RETURN FOUND;
END $$;

CREATE FUNCTION postroom_end_lease(p_epoch bigint) RETURNS void LANGUAGE sql AS $$
    UPDATE leases SET holder = NULL, expires_at = '-infinity' WHERE shard = 0 AND epoch = p_epoch
$$;

CREATE FUNCTION postroom_require_epoch(p_epoch bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(7305, 2);
    PERFORM 1 FROM leases WHERE shard = 0 AND epoch = p_epoch;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'epoch % is over', p_epoch USING ERRCODE = 'PR002';
    END IF;
END $$;

-- The completion of a batch: outcomes, replies, dead letters, sessions, stragglers and tallies, whole.
-- Repeating it does nothing twice: all that follows an outcome is tied to the row that was inserted now.
CREATE FUNCTION postroom_complete(
    p_epoch bigint, p_now timestamptz, p_low_water bigint, p_stragglers bigint[],
    c_seq bigint[], c_received timestamptz[], c_outcome text[], c_service text[], c_rule text[],
    c_attempts integer[], c_unreadable boolean[],
    s_key text[], s_number text[], s_wa_id text[], s_user_id text[], s_active text[], s_state text[],
    s_version bigint[],
    r_seq bigint[], r_ordinal integer[], r_session text[], r_number text[], r_recipient text[], r_service text[],
    r_payload text[], r_correlation text[],
    d_seq bigint[], d_received timestamptz[], d_phone text[], d_service text[], d_payload text[], d_error text[],
    d_status text[], d_resolution text[], d_retry_at timestamptz[], d_message_id text[], d_session text[],
    d_attempts integer[], d_correlation text[]
) RETURNS integer LANGUAGE plpgsql SET enable_seqscan = off AS $$
DECLARE
    done bigint[];
    counts record;
BEGIN
    PERFORM postroom_require_epoch(p_epoch);

    WITH completed AS (
        INSERT INTO message_outcomes (seq, received_at, completed_at, epoch, attempts, outcome, service, rule)
        SELECT c.seq, c.received, p_now, p_epoch, c.attempts, c.outcome, c.service, c.rule
          FROM unnest(c_seq, c_received, c_attempts, c_outcome, c_service, c_rule)
               AS c (seq, received, attempts, outcome, service, rule)
            ON CONFLICT DO NOTHING
        RETURNING seq, outcome
    )
    SELECT array_agg(seq) AS seqs,
           count(*) FILTER (WHERE outcome = 'handled') AS handled,
           count(*) FILTER (WHERE outcome = 'delivered') AS delivered,
           count(*) FILTER (WHERE outcome = 'rejected') AS rejected,
           count(*) FILTER (WHERE outcome = 'dead_letter') AS dead_letter
      INTO counts FROM completed;
    done := coalesce(counts.seqs, '{}');

    IF cardinality(r_seq) > 0 THEN
        INSERT INTO whatsapp_outbox (seq, ordinal, session_key, phone_number_id, recipient, service, payload,
                                     status, correlation_id, created_at)
        SELECT r.seq, r.ordinal, r.session, r.number, r.recipient, r.service, r.payload::jsonb, 'unsent',
               r.correlation, p_now
          FROM unnest(r_seq, r_ordinal, r_session, r_number, r_recipient, r_service, r_payload, r_correlation)
               WITH ORDINALITY AS r (seq, ordinal, session, number, recipient, service, payload, correlation, pos)
         WHERE r.seq = ANY (done)
         ORDER BY r.pos;
    END IF;

    IF cardinality(d_seq) > 0 THEN
        INSERT INTO webhook_dlq (phone_number, service, payload, error_message, status, resolution, next_retry_at,
                                 created_at, updated_at, seq, received_at, message_id, session_key, attempts,
                                 correlation_id)
        SELECT d.phone, d.service, d.payload::jsonb, d.error, d.status, d.resolution, d.retry_at, p_now, p_now,
               d.seq, d.received, d.message_id, d.session, d.attempts, d.correlation
          FROM unnest(d_seq, d_received, d_phone, d_service, d_payload, d_error, d_status, d_resolution,
                      d_retry_at, d_message_id, d_session, d_attempts, d_correlation)
               AS d (seq, received, phone, service, payload, error, status, resolution, retry_at, message_id,
                     session, attempts, correlation)
         WHERE d.seq = ANY (done);
    END IF;

    IF cardinality(s_key) > 0 THEN
        INSERT INTO user_sessions AS stored (session_key, phone_number_id, wa_id, user_id, active_service, state,
                                             version, last_interaction, created_at)
        SELECT s.key, s.number, s.wa_id, s.user_id, s.active, s.state::jsonb, s.version, p_now, p_now
          FROM unnest(s_key, s_number, s_wa_id, s_user_id, s_active, s_state, s_version)
               AS s (key, number, wa_id, user_id, active, state, version)
            ON CONFLICT (session_key) DO UPDATE
           SET wa_id = excluded.wa_id, user_id = excluded.user_id, active_service = excluded.active_service,
               state = excluded.state, version = excluded.version, last_interaction = excluded.last_interaction
         WHERE stored.version <= excluded.version;
    END IF;

    IF cardinality(p_stragglers) > 0 THEN
        INSERT INTO journal_stragglers (seq) SELECT unnest(p_stragglers) ON CONFLICT DO NOTHING;
    END IF;
    IF EXISTS (SELECT FROM journal_stragglers) THEN
        -- All of the batch, and not only what was inserted now: a repeated batch brings its stragglers again.
        DELETE FROM journal_stragglers WHERE seq = ANY (c_seq);
    END IF;

    UPDATE delivery_tallies t
       SET handled = t.handled + counts.handled, delivered = t.delivered + counts.delivered,
           rejected = t.rejected + counts.rejected, dead_letter = t.dead_letter + counts.dead_letter,
           unreadable_answer = t.unreadable_answer + (
               SELECT count(*) FROM unnest(c_seq, c_unreadable) AS c (seq, unreadable)
                WHERE c.unreadable AND c.seq = ANY (done)),
           low_water = greatest(t.low_water, p_low_water)
     WHERE shard = 0;
    RETURN cardinality(done);
END $$;

-- Dead letters that an operator asked to be retried, and those that an earlier owner left claimed.
CREATE FUNCTION postroom_claim_dead_letters(p_epoch bigint, p_now timestamptz, p_limit integer)
RETURNS SETOF webhook_dlq LANGUAGE plpgsql AS $$
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    RETURN QUERY
    UPDATE webhook_dlq d SET status = 'processing', claimed_epoch = p_epoch, updated_at = p_now
     WHERE d.id IN (SELECT c.id FROM webhook_dlq c
                     WHERE (c.status = 'pending' AND c.retry_requested_at IS NOT NULL)
                        OR (c.status = 'processing' AND c.claimed_epoch < p_epoch)
                     ORDER BY c.seq LIMIT p_limit FOR UPDATE SKIP LOCKED)
    RETURNING d.*;
END $$;

-- How a replay ended. Its session change and replies are committed with it.
CREATE FUNCTION postroom_complete_replay(
    p_epoch bigint, p_now timestamptz, p_id uuid, p_outcome text, p_resolution text, p_status text,
    p_error text, p_retry_at timestamptz, p_attempts integer,
    s_key text, s_number text, s_wa_id text, s_user_id text, s_active text, s_state text, s_version bigint,
    r_recipient text, r_payload text[]
) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    letter webhook_dlq;
    before text;
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    UPDATE webhook_dlq d
       SET status = p_status, resolution = p_resolution, error_message = coalesce(p_error, d.error_message),
           next_retry_at = p_retry_at, retry_requested_at = NULL, claimed_epoch = NULL, updated_at = p_now,
           attempts = d.attempts + p_attempts, retry_count = d.retry_count + 1
     WHERE d.id = p_id AND d.status = 'processing' AND d.claimed_epoch = p_epoch
    RETURNING d.* INTO letter;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    SELECT o.outcome INTO before FROM message_outcomes o
     WHERE o.seq = letter.seq AND o.received_at = letter.received_at FOR UPDATE;
    IF before <> p_outcome THEN
        UPDATE message_outcomes SET outcome = p_outcome, completed_at = p_now, epoch = p_epoch
         WHERE seq = letter.seq AND received_at = letter.received_at;
        UPDATE delivery_tallies t
           SET delivered = delivered + (p_outcome = 'delivered')::int - (before = 'delivered')::int,
               rejected = rejected + (p_outcome = 'rejected')::int - (before = 'rejected')::int,
               dead_letter = dead_letter + (p_outcome = 'dead_letter')::int - (before = 'dead_letter')::int
         WHERE shard = 0;
    END IF;
    INSERT INTO whatsapp_outbox (seq, ordinal, session_key, phone_number_id, recipient, service, payload, status,
                                 correlation_id, created_at)
    SELECT letter.seq, r.pos, letter.session_key, s_number, r_recipient, letter.service, r.payload::jsonb, 'unsent',
           letter.correlation_id, p_now
      FROM unnest(r_payload) WITH ORDINALITY AS r (payload, pos) ORDER BY r.pos;
    IF s_key IS NOT NULL THEN
        INSERT INTO user_sessions AS stored (session_key, phone_number_id, wa_id, user_id, active_service, state,
                                             version, last_interaction, created_at)
        VALUES (s_key, s_number, s_wa_id, s_user_id, s_active, s_state::jsonb, s_version, p_now, p_now)
            ON CONFLICT (session_key) DO UPDATE
           SET active_service = excluded.active_service, state = excluded.state, version = excluded.version
         WHERE stored.version < excluded.version;
    END IF;
    RETURN true;
END $$;

-- Reading. The bytes are the truth; jsonb is a view of them for people and dashboards.

CREATE FUNCTION postroom_as_jsonb(p_body bytea) RETURNS jsonb LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    body text;
BEGIN
    BEGIN
        body := convert_from(p_body, 'UTF8');
        RETURN body::jsonb;
    EXCEPTION WHEN OTHERS THEN
        NULL;
    END;
    BEGIN
        -- jsonb has no room for \u0000 and lone surrogates: the view shows the replacement character. An
        -- escape begins after an even number of backslashes; a pair of surrogates is one character.
        RETURN regexp_replace(body,
            '(?<=(?:^|[^\\])(?:\\\\)*)(?:'
            '\\u0000'
            '|\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})'
            '|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}'
            ')', '\\ufffd', 'g')::jsonb;
    EXCEPTION WHEN OTHERS THEN
        RETURN NULL;
    END;
END $$;

CREATE FUNCTION postroom_item_payload(p_body bytea, p_path text) RETURNS jsonb LANGUAGE sql STABLE AS $$
    SELECT CASE
        WHEN p_path = '' THEN postroom_as_jsonb(p_body)
        ELSE postroom_as_jsonb(p_body) #> (
            ARRAY['entry', split_part(p_path, '.', 1)]
            || CASE WHEN split_part(p_path, '.', 2) = '' THEN '{}'::text[]
                    ELSE ARRAY['changes', split_part(p_path, '.', 2)] END
            || CASE left(split_part(p_path, '.', 3), 1)
                    WHEN 'm' THEN ARRAY['value', 'messages', substr(split_part(p_path, '.', 3), 2)]
                    WHEN 's' THEN ARRAY['value', 'statuses', substr(split_part(p_path, '.', 3), 2)]
                    WHEN 'e' THEN ARRAY['value', 'errors', substr(split_part(p_path, '.', 3), 2)]
                    ELSE '{}'::text[] END)
    END
$$;

CREATE VIEW whatsapp_messages WITH (security_invoker = true) AS
SELECT i.message_id, i.session_key, 'inbound'::text AS direction, i.type, o.service,
       postroom_item_payload(e.body, i.path) AS payload, i.received_at, e.correlation_id,
       i.seq, i.phone_number_id, i.reason,
       coalesce(o.outcome, i.bucket, 'journaled') AS place, o.rule, o.attempts, o.completed_at
  FROM whatsapp_messages_items i
  LEFT JOIN wa_events e ON e.event_id = i.event_id AND e.received_at = i.received_at
  LEFT JOIN message_outcomes o ON o.seq = i.seq AND o.received_at = i.received_at
 WHERE i.kind = 'm'
UNION ALL
SELECT NULL, r.session_key, 'outbound', r.payload ->> 'type', r.service, r.payload, r.created_at, r.correlation_id,
       r.seq, r.phone_number_id, NULL, r.status, NULL, NULL, NULL
  FROM whatsapp_outbox r;

CREATE VIEW processed_webhook_messages WITH (security_invoker = true) AS
SELECT i.message_id, i.received_at AS created_at,
       i.bucket IS NOT NULL OR coalesce(o.outcome, 'dead_letter') <> 'dead_letter' AS processed,
       i.seq, i.phone_number_id, coalesce(o.outcome, i.bucket, 'journaled') AS place, o.completed_at
  FROM whatsapp_messages_items i
  LEFT JOIN message_outcomes o ON o.seq = i.seq AND o.received_at = i.received_at
 WHERE i.kind = 'm';
