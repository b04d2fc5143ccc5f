-- What became of a message that a service sent, or answered with, told to that service: each status once it is there,
-- in a queue that is emptied as they are told. Only for services that want to know.

CREATE TABLE status_subscriptions (
    service text PRIMARY KEY
);
COMMENT ON TABLE status_subscriptions IS 'Services with statuses = true, as whoever delivers has them configured';

CREATE TABLE status_deliveries (
    id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    service         text NOT NULL,
    outbox_id       bigint NOT NULL REFERENCES whatsapp_outbox (id) ON DELETE CASCADE,
    status          text NOT NULL,
    status_at       timestamptz,
    error_message   text,
    created_at      timestamptz NOT NULL,
    attempts        integer NOT NULL DEFAULT 0,
    next_attempt_at timestamptz
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05);
CREATE INDEX status_deliveries_service ON status_deliveries (service, id);
CREATE INDEX status_deliveries_outbox_id ON status_deliveries (outbox_id, id);
COMMENT ON TABLE status_deliveries IS 'Statuses that a service is still to be told; of one message in order';

SELECT postroom_protect('status_subscriptions', 'rad', 'r', 'r');
SELECT postroom_protect('status_deliveries', 'rawd', 'r', 'r');

-- A status and the name of its message may be committed at the same moment, neither seeing the other: the lock lets one
-- of them wait for the other's commit, and look then.
CREATE FUNCTION postroom_queue_statuses() RETURNS trigger LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM status_subscriptions) THEN
        RETURN NULL;
    END IF;
    PERFORM pg_advisory_xact_lock(7305, 7);
    INSERT INTO status_deliveries (service, outbox_id, status, status_at, created_at)
    SELECT o.service, o.id, n.status, n.status_at, n.recorded_at
      FROM new_rows n
      JOIN whatsapp_outbox o ON o.phone_number_id = n.phone_number_id AND o.message_id = n.message_id
      JOIN status_subscriptions s ON s.service = o.service
     ORDER BY o.id;
    IF FOUND THEN
        NOTIFY postroom_statuses;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER postroom_queue_new_statuses AFTER INSERT ON whatsapp_statuses
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION postroom_queue_statuses();
CREATE TRIGGER postroom_queue_later_statuses AFTER UPDATE ON whatsapp_statuses
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION postroom_queue_statuses();

-- A status may be here before it is on record under which name the channel took the message; and what the channel never
-- took has no other status.
CREATE FUNCTION postroom_queue_statuses_of_sent() RETURNS trigger LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM status_subscriptions) THEN
        RETURN NULL;
    END IF;
    PERFORM pg_advisory_xact_lock(7305, 7);
    INSERT INTO status_deliveries (service, outbox_id, status, status_at, error_message, created_at)
    SELECT n.service, n.id, CASE WHEN n.status = 'failed' THEN 'failed' ELSE w.status END, w.status_at,
           n.error_message, coalesce(n.updated_at, n.created_at)
      FROM new_rows n JOIN old_rows o ON o.id = n.id
      JOIN status_subscriptions s ON s.service = n.service
      LEFT JOIN whatsapp_statuses w ON w.phone_number_id = n.phone_number_id AND w.message_id = n.message_id
     WHERE (n.status = 'failed' AND o.status <> 'failed')
        OR (n.message_id IS NOT NULL AND o.message_id IS NULL AND w.message_id IS NOT NULL)
     ORDER BY n.id;
    IF FOUND THEN
        NOTIFY postroom_statuses;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER postroom_queue_statuses_of_sent AFTER UPDATE ON whatsapp_outbox
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION postroom_queue_statuses_of_sent();

-- Who wants to know, as whoever delivers has it; what waits for others is forgotten.
CREATE FUNCTION postroom_subscribe_statuses(p_epoch bigint, p_services text[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    DELETE FROM status_subscriptions WHERE service <> ALL (p_services);
    INSERT INTO status_subscriptions (service) SELECT unnest(p_services) ON CONFLICT DO NOTHING;
    DELETE FROM status_deliveries WHERE service <> ALL (p_services);
END $$;

-- The oldest of each message, those that are due.
CREATE FUNCTION postroom_due_statuses(p_now timestamptz, p_service text, p_limit integer) RETURNS TABLE (
    id bigint, status text, status_at timestamptz, error_message text, created_at timestamptz, attempts integer,
    outbox_id bigint, message_id text, phone_number_id text, recipient text, correlation_id text, session_key text,
    wa_id text, user_id text, active_service text, state text, version bigint
) LANGUAGE sql STABLE SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
    SELECT d.id, d.status, d.status_at, d.error_message, d.created_at, d.attempts, d.outbox_id, o.message_id,
           o.phone_number_id, o.recipient, o.correlation_id, o.session_key, u.wa_id, u.user_id, u.active_service,
           u.state::text, u.version
      FROM status_deliveries d
      JOIN whatsapp_outbox o ON o.id = d.outbox_id
      LEFT JOIN user_sessions u ON u.session_key = o.session_key
     WHERE d.service = p_service AND (d.next_attempt_at IS NULL OR d.next_attempt_at <= p_now)
       AND NOT EXISTS (SELECT FROM status_deliveries b WHERE b.outbox_id = d.outbox_id AND b.id < d.id)
     ORDER BY d.id LIMIT p_limit
$$;

CREATE FUNCTION postroom_statuses_told(
    p_epoch bigint, p_done bigint[], p_later bigint[], p_next_at timestamptz[]
) RETURNS void LANGUAGE plpgsql SET enable_seqscan = off AS $$
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    DELETE FROM status_deliveries WHERE id = ANY (p_done);
    UPDATE status_deliveries d SET attempts = d.attempts + 1, next_attempt_at = l.next_at
      FROM unnest(p_later, p_next_at) AS l (id, next_at) WHERE d.id = l.id;
END $$;
