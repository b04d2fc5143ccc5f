-- Replies are sent from the outbox. postroom_complete and postroom_complete_replay are those of 0003, with the status
-- in which replies are put there: pending where a sender is configured, else unsent for good.

ALTER TABLE whatsapp_outbox
    DROP CONSTRAINT whatsapp_outbox_status_check,
    ADD CONSTRAINT whatsapp_outbox_status_check CHECK (status IN ('unsent', 'pending', 'sent', 'failed')),
    ADD COLUMN message_id text,
    ADD COLUMN attempts integer NOT NULL DEFAULT 0,
    ADD COLUMN error_message text,
    ADD COLUMN next_attempt_at timestamptz,
    ADD COLUMN updated_at timestamptz,
    SET (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05);
COMMENT ON COLUMN whatsapp_outbox.message_id IS 'As the channel named it when it took it; statuses name it so';
CREATE INDEX whatsapp_outbox_pending ON whatsapp_outbox (id) WHERE status = 'pending';
CREATE INDEX whatsapp_outbox_pending_of ON whatsapp_outbox (session_key, id) WHERE status = 'pending';
CREATE INDEX whatsapp_outbox_message_id ON whatsapp_outbox (phone_number_id, message_id) WHERE message_id IS NOT NULL;

-- The oldest p_of_each pending replies of at most p_conversations, those that are due and not in p_busy.
CREATE FUNCTION postroom_unsent(p_now timestamptz, p_conversations integer, p_of_each integer, p_busy text[])
RETURNS SETOF whatsapp_outbox LANGUAGE sql STABLE
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
    SELECT r.*
      FROM (SELECT o.session_key FROM whatsapp_outbox o
             WHERE o.status = 'pending' AND o.session_key <> ALL (p_busy)
               AND (o.next_attempt_at IS NULL OR o.next_attempt_at <= p_now)
               AND NOT EXISTS (SELECT FROM whatsapp_outbox b
                                WHERE b.status = 'pending' AND b.session_key = o.session_key AND b.id < o.id)
             ORDER BY o.id LIMIT p_conversations) head
     CROSS JOIN LATERAL (SELECT * FROM whatsapp_outbox p
                          WHERE p.status = 'pending' AND p.session_key = head.session_key
                          ORDER BY p.id LIMIT p_of_each) r
     ORDER BY r.id
$$;

-- How attempts ended; what is not pending any more was put on record before.
CREATE FUNCTION postroom_record_sent(
    p_epoch bigint, p_now timestamptz, p_id bigint[], p_status text[], p_message_id text[], p_error text[],
    p_next_at timestamptz[]
) RETURNS void LANGUAGE plpgsql SET enable_seqscan = off AS $$
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    UPDATE whatsapp_outbox o
       SET status = r.status, message_id = r.message_id, error_message = r.error, next_attempt_at = r.next_at,
           attempts = o.attempts + 1, updated_at = p_now
      FROM unnest(p_id, p_status, p_message_id, p_error, p_next_at) AS r (id, status, message_id, error, next_at)
     WHERE o.id = r.id AND o.status = 'pending';
END $$;

DROP FUNCTION postroom_complete(
    bigint, timestamptz, bigint, bigint[], bigint[], timestamptz[], text[], text[], text[], integer[],
    boolean[], text[], text[], text[], text[], text[], text[], bigint[], bigint[], integer[], text[], text[],
    text[], text[], text[], text[], bigint[], timestamptz[], text[], text[], text[], text[], text[], text[],
    timestamptz[], text[], text[], integer[], text[], boolean[]);
CREATE FUNCTION postroom_complete(
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
           deferred = t.deferred + counts.deferred,
           unreadable_answer = t.unreadable_answer + (
               SELECT count(*) FROM unnest(c_seq, c_unreadable) AS c (seq, unreadable)
                WHERE c.unreadable AND c.seq = ANY (done)),
           low_water = greatest(t.low_water, p_low_water)
     WHERE shard = 0;
    RETURN cardinality(done);
END $$;

DROP FUNCTION postroom_complete_replay(
    bigint, timestamptz, uuid, text, text, text, text, timestamptz, integer, boolean, boolean,
    text, text, text, text, text, text, bigint, text, text[]);
CREATE FUNCTION postroom_complete_replay(
    p_epoch bigint, p_now timestamptz, p_id uuid, p_outcome text, p_resolution text, p_status text,
    p_error text, p_retry_at timestamptz, p_attempts integer, p_counted boolean, p_keeps_order boolean,
    s_key text, s_number text, s_wa_id text, s_user_id text, s_active text, s_state text, s_version bigint,
    r_recipient text, r_payload text[], r_status text
) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    letter webhook_dlq;
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    UPDATE webhook_dlq d
       SET status = p_status, resolution = p_resolution, error_message = coalesce(p_error, d.error_message),
           next_retry_at = p_retry_at, retry_requested_at = NULL, claimed_epoch = NULL, updated_at = p_now,
           attempts = d.attempts + p_attempts, retry_count = d.retry_count + p_counted::int,
           keeps_order = p_keeps_order
     WHERE d.id = p_id AND d.status = 'processing' AND d.claimed_epoch = p_epoch
    RETURNING d.* INTO letter;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM postroom_move_outcomes(p_now, p_epoch, ARRAY[p_id], p_outcome);
    INSERT INTO whatsapp_outbox (seq, ordinal, session_key, phone_number_id, recipient, service, payload, status,
                                 correlation_id, created_at)
    SELECT letter.seq, r.pos, letter.session_key, s_number, r_recipient, letter.service, r.payload::jsonb, r_status,
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

-- An outbound message is where its furthest status says, once there is one.
CREATE OR REPLACE VIEW whatsapp_messages WITH (security_invoker = true) AS
SELECT i.message_id, i.session_key, 'inbound'::text AS direction, i.type, o.service,
       postroom_item_payload(e.body, i.path) AS payload, i.received_at, e.correlation_id,
       i.seq, i.phone_number_id, i.reason,
       coalesce(o.outcome, i.bucket, 'journaled') AS place, o.rule, o.attempts, o.completed_at
  FROM whatsapp_messages_items i
  LEFT JOIN wa_events e ON e.event_id = i.event_id AND e.received_at = i.received_at
  LEFT JOIN message_outcomes o ON o.seq = i.seq AND o.received_at = i.received_at
 WHERE i.kind = 'm'
UNION ALL
SELECT r.message_id, r.session_key, 'outbound', r.payload ->> 'type', r.service, r.payload, r.created_at,
       r.correlation_id, r.seq, r.phone_number_id, r.error_message, coalesce(s.status, r.status), NULL, r.attempts,
       r.updated_at
  FROM whatsapp_outbox r
  LEFT JOIN whatsapp_statuses s ON s.phone_number_id = r.phone_number_id AND s.message_id = r.message_id;
