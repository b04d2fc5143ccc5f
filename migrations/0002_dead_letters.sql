-- Dead letters on a schedule: who is due, one head for each conversation and service, every run on record.

CREATE INDEX webhook_dlq_pending ON webhook_dlq (seq) WHERE status = 'pending';
CREATE INDEX webhook_dlq_open ON webhook_dlq (session_key, service, seq) WHERE status IN ('pending', 'processing');

CREATE TABLE dlq_processing_log (
    id                bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    processed_at      timestamptz NOT NULL,
    status            text NOT NULL CHECK (status IN ('completed', 'failed')),
    entries_processed integer NOT NULL,
    entries_failed    integer NOT NULL,
    error_message     text
);
CREATE INDEX dlq_processing_log_processed_at ON dlq_processing_log (processed_at);
COMMENT ON TABLE dlq_processing_log IS
    'A row for every run of the retrier, also an empty or a failed one. entries_processed: replays that ended in '
    'this run; entries_failed: those of them that did not end in a delivery';

CREATE TABLE audit_log (
    id             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    acted_at       timestamptz NOT NULL,
    actor          text NOT NULL,
    action         text NOT NULL,
    object_type    text NOT NULL,
    object_id      text NOT NULL,
    detail         jsonb NOT NULL DEFAULT '{}',
    correlation_id text
);
CREATE INDEX audit_log_object ON audit_log (object_type, object_id);
COMMENT ON TABLE audit_log IS
    'What operators did. detail names what was changed and never holds a personal value';

-- Asks whoever delivers for a run now.
CREATE FUNCTION process_dlq_entries() RETURNS void LANGUAGE sql AS $$
    SELECT pg_notify('postroom_dead_letters', '')
$$;

-- Letters that were claimed by somebody who is gone, all but p_keep; a page in the order of their keys from
-- p_after on: due again as they were. Returns the last key of the page, or null when there is none.
CREATE FUNCTION postroom_release_dead_letters(
    p_epoch bigint, p_now timestamptz, p_keep uuid[], p_after uuid, p_limit integer
) RETURNS uuid LANGUAGE plpgsql AS $$
DECLARE
    page uuid[];
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    page := ARRAY(SELECT id FROM webhook_dlq
                   WHERE status = 'processing' AND id <> ALL (p_keep) AND (p_after IS NULL OR id > p_after)
                   ORDER BY id LIMIT p_limit FOR UPDATE SKIP LOCKED);
    UPDATE webhook_dlq SET status = 'pending', claimed_epoch = NULL, updated_at = p_now
     WHERE id = ANY (page) AND status = 'processing';
    RETURN page[cardinality(page)];
END $$;

-- A page of letters for p_services, or, with p_others, for all but these: what an operator asked for, and the
-- oldest open letter of each conversation and service where it is due. None whose conversation has one
-- under way with that service.
DROP FUNCTION postroom_claim_dead_letters(bigint, timestamptz, integer);
CREATE FUNCTION postroom_claim_dead_letters(
    p_epoch bigint, p_now timestamptz, p_limit integer, p_services text[], p_others boolean
) RETURNS SETOF webhook_dlq LANGUAGE plpgsql AS $$
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    RETURN QUERY
    UPDATE webhook_dlq d
       SET status = 'processing', claimed_epoch = p_epoch, updated_at = p_now
     WHERE d.status = 'pending' AND d.id IN (
        SELECT c.id FROM webhook_dlq c
         WHERE c.status = 'pending' AND (c.service = ANY (p_services)) <> p_others
           AND (c.retry_requested_at IS NOT NULL
                OR (NOT p_others AND (c.next_retry_at <= p_now OR c.resolution = 'no_service')))
           AND NOT EXISTS (
                SELECT FROM webhook_dlq o
                 WHERE o.session_key = c.session_key AND o.service = c.service AND o.id <> c.id
                   AND o.status IN ('pending', 'processing')
                   AND (o.status = 'processing'
                        -- It is older. What nobody asked for waits for any such, what somebody asked for
                        -- only for one that goes now.
                        OR (o.seq < c.seq
                            AND (c.retry_requested_at IS NULL OR o.retry_requested_at IS NOT NULL
                                 OR (NOT p_others
                                     AND (o.next_retry_at <= p_now OR o.resolution = 'no_service')
                                     AND NOT EXISTS (
                                         SELECT FROM webhook_dlq h
                                          WHERE h.session_key = c.session_key AND h.service = c.service
                                            AND h.status = 'pending' AND h.seq < o.seq))))))
         ORDER BY c.seq LIMIT p_limit)
    RETURNING d.*;
END $$;

-- Pending letters older than the longest wait are given up; returns how many.
CREATE FUNCTION postroom_expire_dead_letters(p_epoch bigint, p_now timestamptz, p_created_before timestamptz)
RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    expired integer;
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    UPDATE webhook_dlq
       SET status = 'failed', resolution = 'exhausted', next_retry_at = NULL, updated_at = p_now
     WHERE id IN (SELECT id FROM webhook_dlq
                   WHERE status = 'pending' AND resolution IS NULL AND retry_requested_at IS NULL
                     AND created_at < p_created_before
                     FOR UPDATE SKIP LOCKED);
    GET DIAGNOSTICS expired = ROW_COUNT;
    RETURN expired;
END $$;

-- The end of a run: its row; returns when the next letter is due, or null.
CREATE FUNCTION postroom_log_retry_run(
    p_epoch bigint, p_now timestamptz, p_processed integer, p_failed integer, p_error text, p_services text[]
) RETURNS timestamptz LANGUAGE plpgsql AS $$
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    INSERT INTO dlq_processing_log (processed_at, status, entries_processed, entries_failed, error_message)
    VALUES (p_now, CASE WHEN p_error IS NULL THEN 'completed' ELSE 'failed' END, p_processed, p_failed, p_error);
    RETURN (SELECT min(CASE WHEN c.retry_requested_at IS NOT NULL OR c.resolution = 'no_service' THEN p_now
                            ELSE c.next_retry_at END)
              FROM webhook_dlq c
             WHERE c.status = 'pending'
               AND (c.retry_requested_at IS NOT NULL
                    OR (c.service = ANY (p_services)
                        AND NOT EXISTS (SELECT FROM webhook_dlq o
                                         WHERE o.session_key = c.session_key AND o.service = c.service
                                           AND o.status IN ('pending', 'processing') AND o.seq < c.seq))));
END $$;

-- How a replay ended. Its session change and replies are committed with it. p_counted: it was an attempt of
-- ours, and not one that the service, or its absence, put off.
DROP FUNCTION postroom_complete_replay(
    bigint, timestamptz, uuid, text, text, text, text, timestamptz, integer,
    text, text, text, text, text, text, bigint, text, text[]);
CREATE FUNCTION postroom_complete_replay(
    p_epoch bigint, p_now timestamptz, p_id uuid, p_outcome text, p_resolution text, p_status text,
    p_error text, p_retry_at timestamptz, p_attempts integer, p_counted boolean,
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
           attempts = d.attempts + p_attempts, retry_count = d.retry_count + p_counted::int
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
               dead_letter = dead_letter + (p_outcome = 'dead_letter')::int - (before = 'dead_letter')::int,
               discarded = discarded - (before = 'discarded')::int
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

-- Operators' acts. Each names who acted, and returns the letters that it applies to.

-- What is being processed, was delivered or was discarded is left alone.
CREATE FUNCTION postroom_can_be_acted_on(p_status text, p_resolution text) RETURNS boolean
LANGUAGE sql IMMUTABLE AS $$
    SELECT p_status IN ('pending', 'failed') AND p_resolution IS DISTINCT FROM 'discarded'
$$;

CREATE FUNCTION postroom_select_dead_letters(
    p_ids uuid[], p_service text, p_status text, p_resolution text, p_session text, p_before timestamptz,
    p_limit integer
) RETURNS SETOF webhook_dlq LANGUAGE sql STABLE AS $$
    SELECT d.* FROM webhook_dlq d
     WHERE (p_ids IS NULL OR d.id = ANY (p_ids)) AND (p_service IS NULL OR d.service = p_service)
       AND (p_status IS NULL OR d.status = p_status)
       AND (p_resolution IS NULL OR d.resolution = p_resolution)
       AND (p_session IS NULL OR d.session_key = p_session)
       AND (p_before IS NULL OR d.created_at < p_before)
     ORDER BY d.seq LIMIT p_limit
$$;

CREATE FUNCTION postroom_retry_dead_letters(p_now timestamptz, p_actor text, p_ids uuid[])
RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    asked uuid[];
BEGIN
    WITH chosen AS (
        UPDATE webhook_dlq d
           SET status = 'pending', resolution = CASE WHEN resolution = 'no_service' THEN resolution END,
               retry_requested_at = p_now, updated_at = p_now
         WHERE d.id = ANY (p_ids) AND postroom_can_be_acted_on(d.status, d.resolution)
        RETURNING d.id
    ) SELECT array_agg(id) INTO asked FROM chosen;
    INSERT INTO audit_log (acted_at, actor, action, object_type, object_id)
    SELECT p_now, p_actor, 'dlq.retry', 'webhook_dlq', a.id::text FROM unnest(asked) AS a (id);
    PERFORM process_dlq_entries();
    RETURN coalesce(cardinality(asked), 0);
END $$;

CREATE FUNCTION postroom_edit_dead_letter(p_now timestamptz, p_actor text, p_id uuid, p_payload jsonb)
RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    edit integer;
BEGIN
    UPDATE webhook_dlq d
       SET payload = p_payload, revision = revision + 1, status = 'pending', retry_requested_at = p_now,
           resolution = CASE WHEN resolution = 'no_service' THEN resolution END, updated_at = p_now
     WHERE d.id = p_id AND postroom_can_be_acted_on(d.status, d.resolution)
    RETURNING d.revision INTO edit;
    IF FOUND THEN
        INSERT INTO audit_log (acted_at, actor, action, object_type, object_id, detail)
        VALUES (p_now, p_actor, 'dlq.edit', 'webhook_dlq', p_id::text, jsonb_build_object('revision', edit));
        PERFORM process_dlq_entries();
    END IF;
    RETURN edit;
END $$;

CREATE FUNCTION postroom_discard_dead_letters(p_now timestamptz, p_actor text, p_ids uuid[], p_reason text)
RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    gone record;
BEGIN
    WITH chosen AS (
        UPDATE webhook_dlq d
           SET status = 'failed', resolution = 'discarded', next_retry_at = NULL, retry_requested_at = NULL,
               updated_at = p_now
         WHERE d.id = ANY (p_ids) AND postroom_can_be_acted_on(d.status, d.resolution)
        RETURNING d.id, d.seq, d.received_at
    ), before AS (
        SELECT c.id, c.seq, c.received_at, o.outcome FROM chosen c
          JOIN message_outcomes o ON o.seq = c.seq AND o.received_at = c.received_at
    ), ended AS (
        UPDATE message_outcomes o SET outcome = 'discarded', completed_at = p_now FROM before b
         WHERE o.seq = b.seq AND o.received_at = b.received_at
        RETURNING b.id, b.outcome AS before
    )
    SELECT array_agg(id) AS ids, count(*) AS discarded, count(*) FILTER (WHERE before = 'rejected') AS rejected,
           count(*) FILTER (WHERE before = 'dead_letter') AS dead_letter
      INTO gone FROM ended;
    UPDATE delivery_tallies
       SET discarded = discarded + gone.discarded, rejected = rejected - gone.rejected,
           dead_letter = dead_letter - gone.dead_letter
     WHERE shard = 0;
    INSERT INTO audit_log (acted_at, actor, action, object_type, object_id, detail)
    SELECT p_now, p_actor, 'dlq.discard', 'webhook_dlq', g.id::text, jsonb_build_object('reason', p_reason)
      FROM unnest(gone.ids) AS g (id);
    RETURN gone.discarded;
END $$;
