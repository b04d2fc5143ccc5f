-- Completions come as rows and not as columns: the driver looks at each element of an array before it writes it, and
-- there are two for each message now, where there were fourteen. The function that takes columns stays, for processes of
-- the version before; this one is the same but for what it is given.

CREATE TYPE postroom_done AS (
    seq bigint, received timestamptz, outcome text, service text, rule text, attempts integer, unreadable boolean
);
CREATE TYPE postroom_session AS (
    key text, number text, wa_id text, user_id text, active text, state text, version bigint
);

CREATE FUNCTION postroom_complete(
    p_epoch bigint, p_now timestamptz, p_low_water bigint, p_stragglers bigint[],
    p_done postroom_done[], p_sessions postroom_session[],
    r_seq bigint[], r_ordinal integer[], r_session text[], r_number text[], r_recipient text[], r_service text[],
    r_payload text[], r_correlation text[], r_status text,
    d_seq bigint[], d_received timestamptz[], d_phone text[], d_service text[], d_payload text[], d_error text[],
    d_status text[], d_resolution text[], d_retry_at timestamptz[], d_message_id text[], d_session text[],
    d_attempts integer[], d_correlation text[], d_keeps_order boolean[]
) RETURNS integer LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
DECLARE
    done bigint[];
    counts record;
BEGIN
    PERFORM postroom_require_epoch(p_epoch);

    WITH completed AS (
        INSERT INTO message_outcomes (seq, received_at, completed_at, epoch, attempts, outcome, service, rule)
        SELECT c.seq, c.received, p_now, p_epoch, c.attempts, c.outcome, c.service, c.rule
          FROM unnest(p_done) AS c
         WHERE NOT EXISTS (SELECT FROM message_outcomes o WHERE o.seq = c.seq AND o.received_at = c.received)
        RETURNING seq, outcome
    )
    SELECT array_agg(seq) AS seqs,
           count(*) FILTER (WHERE outcome = 'handled') AS handled,
           count(*) FILTER (WHERE outcome = 'delivered') AS delivered,
           count(*) FILTER (WHERE outcome = 'rejected') AS rejected,
           count(*) FILTER (WHERE outcome = 'dead_letter') AS dead_letter,
           count(*) FILTER (WHERE outcome = 'deferred') AS deferred
      INTO counts FROM completed;
    done := coalesce(counts.seqs, '{}');

    IF cardinality(r_seq) > 0 THEN
        INSERT INTO whatsapp_outbox (seq, ordinal, session_key, phone_number_id, recipient, service, payload,
                                     status, correlation_id, created_at)
        SELECT r.seq, r.ordinal, r.session, r.number, r.recipient, r.service, r.payload::jsonb, r_status,
               r.correlation, p_now
          FROM unnest(r_seq, r_ordinal, r_session, r_number, r_recipient, r_service, r_payload, r_correlation)
               WITH ORDINALITY AS r (seq, ordinal, session, number, recipient, service, payload, correlation, pos)
         WHERE r.seq = ANY (done)
         ORDER BY r.pos;
    END IF;

    IF cardinality(d_seq) > 0 THEN
        INSERT INTO webhook_dlq (phone_number, service, payload, error_message, status, resolution, next_retry_at,
                                 created_at, updated_at, seq, received_at, message_id, session_key, attempts,
                                 correlation_id, keeps_order)
        SELECT d.phone, d.service, d.payload::jsonb, d.error, d.status, d.resolution, d.retry_at, p_now, p_now,
               d.seq, d.received, d.message_id, d.session, d.attempts, d.correlation,
               d.keeps_order
          FROM unnest(d_seq, d_received, d_phone, d_service, d_payload, d_error, d_status, d_resolution,
                      d_retry_at, d_message_id, d_session, d_attempts, d_correlation, d_keeps_order)
               AS d (seq, received, phone, service, payload, error, status, resolution, retry_at, message_id,
                     session, attempts, correlation, keeps_order)
         WHERE d.seq = ANY (done);
    END IF;

    IF cardinality(p_sessions) > 0 THEN
        UPDATE user_sessions AS stored
           SET wa_id = s.wa_id, user_id = s.user_id, active_service = s.active, state = s.state::jsonb,
               version = s.version, last_interaction = p_now
          FROM unnest(p_sessions) AS s
         WHERE stored.session_key = s.key AND stored.version <= s.version;
        INSERT INTO user_sessions (session_key, phone_number_id, wa_id, user_id, active_service, state, version,
                                   last_interaction, created_at)
        SELECT s.key, s.number, s.wa_id, s.user_id, s.active, s.state::jsonb, s.version, p_now, p_now
          FROM unnest(p_sessions) AS s
         WHERE NOT EXISTS (SELECT FROM user_sessions stored WHERE stored.session_key = s.key)
            ON CONFLICT DO NOTHING;
    END IF;

    IF cardinality(p_stragglers) > 0 THEN
        INSERT INTO journal_stragglers (seq) SELECT unnest(p_stragglers) ON CONFLICT DO NOTHING;
    END IF;
    IF EXISTS (SELECT FROM journal_stragglers) THEN
        -- All of the batch, and not only what was inserted now: a repeated batch brings its stragglers again.
        DELETE FROM journal_stragglers WHERE seq IN (SELECT c.seq FROM unnest(p_done) AS c);
    END IF;

    UPDATE delivery_tallies t
       SET handled = t.handled + counts.handled, delivered = t.delivered + counts.delivered,
           rejected = t.rejected + counts.rejected, dead_letter = t.dead_letter + counts.dead_letter,
           deferred = t.deferred + counts.deferred,
           unreadable_answer = t.unreadable_answer + (
               SELECT count(*) FROM unnest(p_done) AS c
                WHERE c.unreadable AND c.seq = ANY (done)),
           low_water = greatest(t.low_water, p_low_water)
     WHERE shard = 0;
    RETURN cardinality(done);
END $$;
