-- Deferral: what a service that is known to be unable cannot take now, and what has to wait behind an earlier
-- message, is a dead letter that keeps its place. Functions that are here again are those of 0001 and 0002 with
-- that added.

ALTER TABLE webhook_dlq ADD COLUMN keeps_order boolean NOT NULL DEFAULT false;
COMMENT ON COLUMN webhook_dlq.keeps_order IS
    'Later messages of the conversation for that service wait behind it';
ALTER TABLE webhook_dlq DROP CONSTRAINT webhook_dlq_resolution_check;
ALTER TABLE webhook_dlq ADD CONSTRAINT webhook_dlq_resolution_check
    CHECK (resolution IN ('exhausted', 'rejected', 'discarded', 'no_service', 'reprocessed', 'deferred'));
CREATE INDEX webhook_dlq_keeps_order ON webhook_dlq (session_key, service)
    WHERE keeps_order AND status IN ('pending', 'processing');
DROP INDEX webhook_dlq_pending;
CREATE INDEX webhook_dlq_pending ON webhook_dlq (service, seq) WHERE status = 'pending';

ALTER TABLE message_outcomes DROP CONSTRAINT message_outcomes_outcome_check;
ALTER TABLE message_outcomes ADD CONSTRAINT message_outcomes_outcome_check
    CHECK (outcome IN ('handled', 'delivered', 'rejected', 'dead_letter', 'discarded', 'deferred'));
ALTER TABLE delivery_tallies ADD COLUMN deferred bigint NOT NULL DEFAULT 0;

-- The same items are somewhere else now: outcomes and tallies. Returns the letters whose items moved.
CREATE FUNCTION postroom_move_outcomes(p_now timestamptz, p_epoch bigint, p_letters uuid[], p_outcome text)
RETURNS uuid[] LANGUAGE plpgsql AS $$
DECLARE
    moved record;
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
        UPDATE delivery_tallies t
           SET delivered = t.delivered - moved.delivered + (p_outcome = 'delivered')::int * moved.items,
               rejected = t.rejected - moved.rejected + (p_outcome = 'rejected')::int * moved.items,
               dead_letter = t.dead_letter - moved.dead_letter + (p_outcome = 'dead_letter')::int * moved.items,
               deferred = t.deferred - moved.deferred + (p_outcome = 'deferred')::int * moved.items,
               discarded = t.discarded - moved.discarded + (p_outcome = 'discarded')::int * moved.items
         WHERE shard = 0;
    END IF;
    RETURN moved.ids;
END $$;

-- Due by itself: its time has come, or it waits for nothing but its turn.
CREATE FUNCTION postroom_is_due(letter webhook_dlq, p_now timestamptz) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT letter.next_retry_at <= p_now OR letter.resolution IN ('no_service', 'deferred')
$$;

DROP FUNCTION postroom_complete(
    bigint, timestamptz, bigint, bigint[], bigint[], timestamptz[], text[], text[], text[], integer[],
    boolean[], text[], text[], text[], text[], text[], text[], bigint[], bigint[], integer[], text[], text[],
    text[], text[], text[], text[], bigint[], timestamptz[], text[], text[], text[], text[], text[], text[],
    timestamptz[], text[], text[], integer[], text[]);
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

-- Who was claimed may have been attempted.
CREATE OR REPLACE FUNCTION postroom_release_dead_letters(
    p_epoch bigint, p_now timestamptz, p_keep uuid[], p_after uuid, p_limit integer
) RETURNS uuid LANGUAGE plpgsql AS $$
DECLARE
    page uuid[];
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    page := ARRAY(SELECT id FROM webhook_dlq
                   WHERE status = 'processing' AND id <> ALL (p_keep) AND (p_after IS NULL OR id > p_after)
                   ORDER BY id LIMIT p_limit FOR UPDATE SKIP LOCKED);
    UPDATE webhook_dlq SET status = 'pending', claimed_epoch = NULL, attempts = greatest(attempts, 1),
                           updated_at = p_now
     WHERE id = ANY (page) AND status = 'processing';
    RETURN page[cardinality(page)];
END $$;

-- A page of letters for p_services, or, with p_others, for all but these: what an operator asked for, and the
-- oldest open letter of each conversation and service where it is due. None whose conversation has one
-- under way with that service. A single one is, of the oldest, the one that was attempted least: it may be
-- that the one before it is what the service stumbles over.
CREATE OR REPLACE FUNCTION postroom_claim_dead_letters(
    p_epoch bigint, p_now timestamptz, p_limit integer, p_services text[], p_others boolean
) RETURNS SETOF webhook_dlq LANGUAGE plpgsql SET enable_seqscan = off AS $$
DECLARE
    wanted text[] := p_services;
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    IF p_others THEN
        wanted := ARRAY(SELECT DISTINCT c.service FROM webhook_dlq c
                         WHERE c.status = 'pending' AND c.retry_requested_at IS NOT NULL
                           AND c.service <> ALL (p_services));
    END IF;
    RETURN QUERY
    UPDATE webhook_dlq d
       SET status = 'processing', claimed_epoch = p_epoch, updated_at = p_now
     WHERE d.status = 'pending' AND d.id IN (
        SELECT head.id FROM unnest(wanted) AS w (service) CROSS JOIN LATERAL (
            SELECT c.id, c.attempts, c.seq FROM webhook_dlq c
             WHERE c.status = 'pending' AND c.service = w.service
               AND (c.retry_requested_at IS NOT NULL
                    OR (NOT p_others AND postroom_is_due(c, p_now)))
               AND NOT EXISTS (
                    SELECT FROM webhook_dlq o
                     WHERE o.session_key = c.session_key AND o.service = c.service AND o.id <> c.id
                       AND o.status IN ('pending', 'processing')
                       AND (o.status = 'processing'
                            OR (o.seq < c.seq AND o.keeps_order)
                            -- It is older. What was deferred goes past it. What nobody asked for waits for any
                            -- such, what somebody asked for only for one that goes now.
                            OR (o.seq < c.seq AND c.resolution IS DISTINCT FROM 'deferred'
                                AND (c.retry_requested_at IS NULL OR o.retry_requested_at IS NOT NULL
                                     OR (NOT p_others AND postroom_is_due(o, p_now)
                                         AND NOT EXISTS (
                                             SELECT FROM webhook_dlq h
                                              WHERE h.session_key = c.session_key AND h.service = c.service
                                                AND h.status = 'pending' AND h.seq < o.seq))))))
             ORDER BY c.seq LIMIT greatest(p_limit, 50)) head
         ORDER BY CASE WHEN p_limit = 1 THEN head.attempts END, head.seq LIMIT p_limit)
    RETURNING d.*;
END $$;

-- Letters older than the longest wait are given up; returns how many.
CREATE OR REPLACE FUNCTION postroom_expire_dead_letters(p_epoch bigint, p_now timestamptz, p_created_before timestamptz)
RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    expired uuid[];
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    WITH given_up AS (
        UPDATE webhook_dlq
           SET status = 'failed', resolution = 'exhausted', next_retry_at = NULL, keeps_order = false,
               updated_at = p_now
         WHERE id IN (SELECT id FROM webhook_dlq
                       WHERE status = 'pending' AND coalesce(resolution, 'deferred') = 'deferred'
                         AND retry_requested_at IS NULL AND created_at < p_created_before
                         FOR UPDATE SKIP LOCKED)
        RETURNING id
    ) SELECT coalesce(array_agg(id), '{}') INTO expired FROM given_up;
    PERFORM postroom_move_outcomes(p_now, p_epoch, expired, 'dead_letter');
    RETURN cardinality(expired);
END $$;

-- The end of a run: its row; returns when the next letter of each service is due.
DROP FUNCTION postroom_log_retry_run(bigint, timestamptz, integer, integer, text, text[]);
CREATE FUNCTION postroom_log_retry_run(
    p_epoch bigint, p_now timestamptz, p_processed integer, p_failed integer, p_error text, p_services text[]
) RETURNS TABLE (service text, due timestamptz) LANGUAGE plpgsql AS $$
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    INSERT INTO dlq_processing_log (processed_at, status, entries_processed, entries_failed, error_message)
    VALUES (p_now, CASE WHEN p_error IS NULL THEN 'completed' ELSE 'failed' END, p_processed, p_failed, p_error);
    RETURN QUERY
    SELECT c.service, min(CASE WHEN c.retry_requested_at IS NOT NULL OR c.resolution IN ('no_service', 'deferred')
                               THEN p_now ELSE c.next_retry_at END)
      FROM webhook_dlq c
     WHERE c.status = 'pending'
       AND (c.retry_requested_at IS NOT NULL OR c.service = ANY (p_services))
       AND NOT EXISTS (SELECT FROM webhook_dlq o
                        WHERE o.session_key = c.session_key AND o.service = c.service
                          AND o.status IN ('pending', 'processing') AND o.seq < c.seq
                          AND (o.keeps_order
                               OR (c.retry_requested_at IS NULL AND c.resolution IS DISTINCT FROM 'deferred')))
     GROUP BY c.service
    HAVING min(CASE WHEN c.retry_requested_at IS NOT NULL OR c.resolution IN ('no_service', 'deferred')
                    THEN p_now ELSE c.next_retry_at END) IS NOT NULL;
END $$;

DROP FUNCTION postroom_complete_replay(
    bigint, timestamptz, uuid, text, text, text, text, timestamptz, integer, boolean, text,
    text, text, text, text, text, bigint, text, text[]);
CREATE FUNCTION postroom_complete_replay(
    p_epoch bigint, p_now timestamptz, p_id uuid, p_outcome text, p_resolution text, p_status text,
    p_error text, p_retry_at timestamptz, p_attempts integer, p_counted boolean, p_keeps_order boolean,
    s_key text, s_number text, s_wa_id text, s_user_id text, s_active text, s_state text, s_version bigint,
    r_recipient text, r_payload text[]
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

CREATE OR REPLACE FUNCTION postroom_retry_dead_letters(p_now timestamptz, p_actor text, p_ids uuid[])
RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    asked uuid[];
BEGIN
    WITH chosen AS (
        UPDATE webhook_dlq d
           SET status = 'pending', resolution = CASE WHEN resolution IN ('no_service', 'deferred') THEN resolution END,
               retry_requested_at = p_now, updated_at = p_now
         WHERE d.id = ANY (p_ids) AND postroom_can_be_acted_on(d.status, d.resolution)
        RETURNING d.id
    ) SELECT array_agg(id) INTO asked FROM chosen;
    INSERT INTO audit_log (acted_at, actor, action, object_type, object_id)
    SELECT p_now, p_actor, 'dlq.retry', 'webhook_dlq', a.id::text FROM unnest(asked) AS a (id);
    PERFORM process_dlq_entries();
    RETURN coalesce(cardinality(asked), 0);
END $$;

CREATE OR REPLACE FUNCTION postroom_edit_dead_letter(p_now timestamptz, p_actor text, p_id uuid, p_payload jsonb)
RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    edit integer;
BEGIN
    UPDATE webhook_dlq d
       SET payload = p_payload, revision = revision + 1, status = 'pending', retry_requested_at = p_now,
           resolution = CASE WHEN resolution IN ('no_service', 'deferred') THEN resolution END, updated_at = p_now
     WHERE d.id = p_id AND postroom_can_be_acted_on(d.status, d.resolution)
    RETURNING d.revision INTO edit;
    IF FOUND THEN
        INSERT INTO audit_log (acted_at, actor, action, object_type, object_id, detail)
        VALUES (p_now, p_actor, 'dlq.edit', 'webhook_dlq', p_id::text, jsonb_build_object('revision', edit));
        PERFORM process_dlq_entries();
    END IF;
    RETURN edit;
END $$;

-- Whoever waited behind one that is gone can go.
CREATE OR REPLACE FUNCTION postroom_discard_dead_letters(p_now timestamptz, p_actor text, p_ids uuid[], p_reason text)
RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    chosen uuid[];
BEGIN
    WITH gone AS (
        UPDATE webhook_dlq d
           SET status = 'failed', resolution = 'discarded', next_retry_at = NULL, retry_requested_at = NULL,
               updated_at = p_now
         WHERE d.id = ANY (p_ids) AND postroom_can_be_acted_on(d.status, d.resolution)
        RETURNING d.id
    ) SELECT array_agg(id) INTO chosen FROM gone;
    chosen := postroom_move_outcomes(p_now, NULL, chosen, 'discarded');
    INSERT INTO audit_log (acted_at, actor, action, object_type, object_id, detail)
    SELECT p_now, p_actor, 'dlq.discard', 'webhook_dlq', c.id::text, jsonb_build_object('reason', p_reason)
      FROM unnest(chosen) AS c (id);
    PERFORM process_dlq_entries();
    RETURN coalesce(cardinality(chosen), 0);
END $$;
