-- Malformed items are split again after a fix. What is readable now is journaled as items of its own, in an event
-- of its own; the item that it was keeps its row, and is no longer malformed but handled.

CREATE INDEX whatsapp_messages_items_malformed ON whatsapp_messages_items (event_id) WHERE bucket = 'malformed';

-- The ledger forgets malformed items that are to be journaled again: those with an id stand in it.
CREATE FUNCTION postroom_forget_malformed(p_event bigint, p_paths text[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(7305, 1);
    DELETE FROM dedup_ledger_0 l USING whatsapp_messages_items i
     WHERE i.event_id = p_event AND i.bucket = 'malformed' AND i.path = ANY (p_paths)
       AND l.key = i.key AND l.seq = i.seq;
    DELETE FROM dedup_ledger_1 l USING whatsapp_messages_items i
     WHERE i.event_id = p_event AND i.bucket = 'malformed' AND i.path = ANY (p_paths)
       AND l.key = i.key AND l.seq = i.seq;
END $$;

-- These items were split again: says so in their rows and in the tallies. Returns how many were malformed still.
CREATE FUNCTION postroom_mark_reparsed(p_now timestamptz, p_actor text, p_event bigint, p_paths text[])
RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    marked integer;
BEGIN
    UPDATE whatsapp_messages_items SET bucket = 'handled', reason = 'reparsed'
     WHERE event_id = p_event AND bucket = 'malformed' AND path = ANY (p_paths);
    GET DIAGNOSTICS marked = ROW_COUNT;
    IF marked > 0 THEN
        UPDATE journal_head SET malformed = malformed - marked, handled = handled + marked WHERE shard = 0;
        INSERT INTO audit_log (acted_at, actor, action, object_type, object_id, detail)
        VALUES (p_now, p_actor, 'events.reparse', 'wa_events', p_event::text, jsonb_build_object('items', marked));
    END IF;
    RETURN marked;
END $$;
