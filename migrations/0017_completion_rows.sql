-- Completions come as rows and not as columns: the driver looks at each array, and at each element of it, before it
-- writes them, and there are two elements for each message now, where there were fourteen. The function that takes columns stays, for processes of
-- the version before; this one is the same but for what it is given.

CREATE TYPE postroom_done AS (
    seq bigint, received timestamptz, outcome text, service text, rule text, attempts integer, unreadable boolean
);
CREATE TYPE postroom_session AS (
    key text, number text, wa_id text, user_id text, active text, state text, version bigint
);
CREATE TYPE postroom_reply AS (
    seq bigint, ordinal integer, session text, number text, recipient text, service text, payload text,
    correlation text
);
CREATE TYPE postroom_letter AS (
    seq bigint, received timestamptz, phone text, service text, payload text, error text, status text,
    resolution text, retry_at timestamptz, message_id text, session text, attempts integer, correlation text,
    keeps_order boolean
);

CREATE FUNCTION postroom_complete(
    p_epoch bigint, p_now timestamptz, p_low_water bigint, p_stragglers bigint[],
    p_done postroom_done[], p_sessions postroom_session[],
    p_replies postroom_reply[], p_reply_status text, p_letters postroom_letter[]
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

    IF cardinality(p_replies) > 0 THEN
        INSERT INTO whatsapp_outbox (seq, ordinal, session_key, phone_number_id, recipient, service, payload,
                                     status, correlation_id, created_at)
        SELECT r.seq, r.ordinal, r.session, r.number, r.recipient, r.service, r.payload::jsonb, p_reply_status,
               r.correlation, p_now
          FROM unnest(p_replies)
               WITH ORDINALITY AS r (seq, ordinal, session, number, recipient, service, payload, correlation, pos)
         WHERE r.seq = ANY (done)
         ORDER BY r.pos;
    END IF;

    IF cardinality(p_letters) > 0 THEN
        INSERT INTO webhook_dlq (phone_number, service, payload, error_message, status, resolution, next_retry_at,
                                 created_at, updated_at, seq, received_at, message_id, session_key, attempts,
                                 correlation_id, keeps_order)
        SELECT d.phone, d.service, d.payload::jsonb, d.error, d.status, d.resolution, d.retry_at, p_now, p_now,
               d.seq, d.received, d.message_id, d.session, d.attempts, d.correlation,
               d.keeps_order
          FROM unnest(p_letters) AS d
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
