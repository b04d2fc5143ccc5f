-- The flush, as in 0001, and cheaper. Its keys are not looked up in the ledger that they are going to: the index there
-- refuses what it has, and to look first is a second descent for each key. What a refused insert wrote is undone with
-- its subtransaction. In the older ledger they are looked up as before.
CREATE OR REPLACE FUNCTION postroom_append(
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
    keys bytea[];
    pos integer;
    item postroom_item;
    known record;
    unsettled bigint;
    current_ledger smallint;
    is_known boolean;
BEGIN
    -- Held to the commit: the order of seqs is the order of commits, in all processes.
    PERFORM pg_advisory_xact_lock(7305, 1);

    -- All that the items are asked for, in one pass: their keys, the conversations of their senders' names, and how
    -- many senders are new, or known by one name only, or by two as two people.
    SELECT array_agg(CASE WHEN i.dedup THEN i.key END ORDER BY i.ordinality),
           array_agg(n.key ORDER BY i.ordinality), array_agg(n.other ORDER BY i.ordinality),
           count(*) FILTER (WHERE i.name IS NOT NULL
                              AND (n.key IS NULL OR (i.other IS NOT NULL AND n.other IS DISTINCT FROM n.key)))
      INTO keys, session_keys, other_keys, unsettled
      FROM unnest(p_items) WITH ORDINALITY AS i
     CROSS JOIN LATERAL (
        SELECT (SELECT s.session_key FROM session_names s
                 WHERE s.phone_number_id = i.number AND s.name = i.name) AS key,
               CASE WHEN i.other IS NOT NULL THEN
                   (SELECT s.session_key FROM session_names s
                     WHERE s.phone_number_id = i.number AND s.name = i.other) END AS other
        OFFSET 0) n;  -- OFFSET: looked up once, not wherever it is named

    SELECT g.current INTO current_ledger FROM dedup_generation g WHERE g.shard = 0;
    IF current_ledger = 0 THEN
        is_known := EXISTS (SELECT FROM dedup_ledger_1 WHERE key = ANY (keys));
    ELSE
        is_known := EXISTS (SELECT FROM dedup_ledger_0 WHERE key = ANY (keys));
    END IF;
    IF NOT is_known THEN
        BEGIN
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

            IF current_ledger = 0 THEN
                INSERT INTO dedup_ledger_0 (key, seq)
                SELECT k.key, first_seq + k.pos - 1
                  FROM unnest(keys) WITH ORDINALITY AS k (key, pos)
                 WHERE k.key IS NOT NULL;
            ELSE
                INSERT INTO dedup_ledger_1 (key, seq)
                SELECT k.key, first_seq + k.pos - 1
                  FROM unnest(keys) WITH ORDINALITY AS k (key, pos)
                 WHERE k.key IS NOT NULL;
            END IF;
        EXCEPTION WHEN unique_violation THEN
            is_known := true;
        END;
    END IF;
    IF is_known THEN
        first_seq := NULL;
        session_keys := NULL;
        SELECT array_agg(hit.pos ORDER BY hit.pos), array_agg(hit.seq ORDER BY hit.pos)
          INTO dup_positions, dup_seqs
          FROM (SELECT k.pos::integer AS pos,
                       coalesce((SELECT l.seq FROM dedup_ledger_0 l WHERE l.key = k.key),
                                (SELECT l.seq FROM dedup_ledger_1 l WHERE l.key = k.key)) AS seq
                  FROM unnest(keys) WITH ORDINALITY AS k (key, pos)) hit
         WHERE hit.seq IS NOT NULL;
        IF dup_positions IS NULL THEN
            RAISE EXCEPTION 'a flush has the same item twice' USING ERRCODE = 'unique_violation';
        END IF;
        RETURN;
    END IF;

    IF unsettled > 0 THEN
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
    END IF;

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
