-- A completion writes less ahead. ON CONFLICT costs two records for each row that is new, and one for each that is not:
-- the row is put there on probation, or locked before it is updated. Only the holder of the lease completes, one batch
-- after the other, so that what is there already is simply looked for. Where a batch is repeated while the first of its
-- kind is still under way in the server, which takes a lost connection, the second fails and is repeated once more.
-- The function is that of 0005 but for that.

CREATE OR REPLACE FUNCTION postroom_complete(
    p_epoch bigint, p_now timestamptz, p_low_water bigint, p_stragglers bigint[],
    c_seq bigint[], c_received timestamptz[], c_outcome text[], c_service text[], c_rule text[],
    c_attempts integer[], c_unreadable boolean[],
    s_key text[], s_number text[], s_wa_id text[], s_user_id text[], s_active text[], s_state text[],
    s_version bigint[],
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
          FROM unnest(c_seq, c_received, c_attempts, c_outcome, c_service, c_rule)
               AS c (seq, received, attempts, outcome, service, rule)
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

    IF cardinality(s_key) > 0 THEN
        UPDATE user_sessions AS stored
           SET wa_id = s.wa_id, user_id = s.user_id, active_service = s.active, state = s.state::jsonb,
               version = s.version, last_interaction = p_now
          FROM unnest(s_key, s_wa_id, s_user_id, s_active, s_state, s_version)
               AS s (key, wa_id, user_id, active, state, version)
         WHERE stored.session_key = s.key AND stored.version <= s.version;
        INSERT INTO user_sessions (session_key, phone_number_id, wa_id, user_id, active_service, state, version,
                                   last_interaction, created_at)
        SELECT s.key, s.number, s.wa_id, s.user_id, s.active, s.state::jsonb, s.version, p_now, p_now
          FROM unnest(s_key, s_number, s_wa_id, s_user_id, s_active, s_state, s_version)
               AS s (key, number, wa_id, user_id, active, state, version)
         WHERE NOT EXISTS (SELECT FROM user_sessions stored WHERE stored.session_key = s.key)
            ON CONFLICT DO NOTHING;
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
           deferred = t.deferred + counts.deferred,
           unreadable_answer = t.unreadable_answer + (
               SELECT count(*) FROM unnest(c_seq, c_unreadable) AS c (seq, unreadable)
                WHERE c.unreadable AND c.seq = ANY (done)),
           low_water = greatest(t.low_water, p_low_water)
     WHERE shard = 0;
    RETURN cardinality(done);
END $$;
