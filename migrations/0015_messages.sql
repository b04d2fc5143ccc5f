-- Messages that a service sends by itself, and not as the answer to one: they wait in the outbox with the replies, in
-- the order of their conversation. Such a row has no item, and the key under which the service may send it again.

ALTER TABLE whatsapp_outbox
    ALTER COLUMN seq DROP NOT NULL,
    ADD COLUMN idempotency_key text,
    ADD COLUMN request_sha256 bytea;
COMMENT ON COLUMN whatsapp_outbox.seq IS 'The item that it answers; null: a service sent it by itself';
COMMENT ON COLUMN whatsapp_outbox.idempotency_key IS
    'As the service gave it; what comes again under it is the same message for as long as the row is here';
CREATE UNIQUE INDEX whatsapp_outbox_idempotency_key ON whatsapp_outbox (service, idempotency_key)
    WHERE idempotency_key IS NOT NULL;

-- Puts a message into the outbox, or finds it there. The conversation is the one that the recipient has under any of
-- its names; without one it is made, so that what the phone answers is of the same.
CREATE FUNCTION postroom_send(
    p_now timestamptz, p_service text, p_key text, p_request_sha256 bytea, p_number text, p_recipient text,
    p_payload text, p_correlation text,
    OUT id bigint, OUT created boolean, OUT is_same boolean, OUT status text
) LANGUAGE plpgsql SET enable_seqscan = off AS $$
DECLARE
    conversation text;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(7305, 1);  -- an erasure forgets what was there before, and not less
    SELECT o.id, false, o.request_sha256 = p_request_sha256, o.status INTO id, created, is_same, status
      FROM whatsapp_outbox o WHERE o.service = p_service AND o.idempotency_key = p_key;
    IF FOUND THEN
        RETURN;
    END IF;
    SELECT n.session_key INTO conversation FROM session_names n
     WHERE n.phone_number_id = p_number AND n.name = p_recipient;
    IF NOT FOUND THEN
        INSERT INTO session_names (phone_number_id, name, session_key, since)
        SELECT p_number, p_recipient, p_number || ':' || p_recipient, h.next_seq FROM journal_head h WHERE h.shard = 0
            ON CONFLICT DO NOTHING;
        SELECT n.session_key INTO STRICT conversation FROM session_names n
         WHERE n.phone_number_id = p_number AND n.name = p_recipient;
    END IF;
    INSERT INTO whatsapp_outbox AS o (ordinal, session_key, phone_number_id, recipient, service, payload, status,
                                      correlation_id, created_at, idempotency_key, request_sha256)
    VALUES (1, conversation, p_number, p_recipient, p_service, p_payload::jsonb, 'pending', p_correlation, p_now,
            p_key, p_request_sha256)
        ON CONFLICT (service, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
    RETURNING o.id, true, true, o.status INTO id, created, is_same, status;
    IF FOUND THEN
        NOTIFY postroom_outbox;
        RETURN;
    END IF;
    SELECT o.id, false, o.request_sha256 = p_request_sha256, o.status INTO STRICT id, created, is_same, status
      FROM whatsapp_outbox o WHERE o.service = p_service AND o.idempotency_key = p_key;
END $$;
