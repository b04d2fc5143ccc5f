-- The audit log, hardened: it is only ever added to, and any table can be watched by one call. Of what was changed it
-- has the names of the columns, and what the row is known by; a name that may be a person's as a keyed hash.

ALTER TABLE audit_log
    ALTER COLUMN acted_at SET DEFAULT now(),
    ADD COLUMN changed text[],
    ADD COLUMN session text,
    ADD COLUMN ip inet,
    ADD COLUMN user_agent text;
COMMENT ON COLUMN audit_log.changed IS 'Names of the columns that were given another value';
CREATE INDEX audit_log_acted_at ON audit_log (acted_at);

INSERT INTO postroom_keys (name, value)
VALUES ('subjects', decode(replace(gen_random_uuid()::text || gen_random_uuid()::text, '-', ''), 'hex'));

CREATE FUNCTION postroom_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is only added to', TG_TABLE_NAME USING ERRCODE = 'insufficient_privilege';
END $$;
CREATE TRIGGER audit_log_is_only_added_to BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log
    FOR EACH STATEMENT EXECUTE FUNCTION postroom_refuse_change();
-- Also for who replays changes, as session_replication_role = replica says of itself.
ALTER TABLE audit_log ENABLE ALWAYS TRIGGER audit_log_is_only_added_to;

-- What a row is known by in the log. HMAC's construction (RFC 2104) on the server's own SHA-256: an id that holds a
-- phone number is not in the log, and who has the number and the key finds it there.
CREATE FUNCTION postroom_subject_hash(p_subject text) RETURNS text LANGUAGE sql STABLE AS $$
    SELECT encode(sha256(k.value || sha256(k.value || convert_to(p_subject, 'UTF8'))), 'hex')
      FROM postroom_keys k WHERE k.name = 'subjects'
$$;

-- What the log says of one row: what it is known by, and the columns that were given another value; nothing of a row in
-- which only ignored columns were.
CREATE FUNCTION postroom_audit_entry(
    p_keys text[], p_personal text[], p_ignored text[], p_old jsonb, p_new jsonb, OUT id text, OUT changed text[]
) LANGUAGE plpgsql STABLE AS $$
BEGIN
    changed := ARRAY(SELECT c.key FROM jsonb_each(coalesce(p_new, p_old)) AS c
                      WHERE p_old IS NULL OR p_new IS NULL OR c.value IS DISTINCT FROM p_old -> c.key ORDER BY c.key);
    IF changed <@ p_ignored THEN
        changed := NULL;
        RETURN;
    END IF;
    id := (SELECT string_agg(CASE WHEN k.name = ANY (p_personal)
                                  THEN postroom_subject_hash(coalesce(p_new, p_old) ->> k.name)
                                  ELSE coalesce(p_new, p_old) ->> k.name END, ' ' ORDER BY k.pos)
             FROM unnest(p_keys) WITH ORDINALITY AS k (name, pos));
END $$;

-- A row of the log for each row that a statement changed. Arguments: the columns of the primary key, those of them that
-- may be personal, and those whose change alone is not worth a row; as arrays.
CREATE FUNCTION postroom_audit_rows() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
    keys text[] := TG_ARGV[0];
    personal text[] := TG_ARGV[1];
    ignored text[] := TG_ARGV[2];
    who text := coalesce(nullif(current_setting('postroom.actor', true), ''),
                         session_user || CASE current_setting('role') WHEN 'none' THEN ''
                                         ELSE '/' || current_setting('role') END);
    session_said text := nullif(current_setting('postroom.session', true), '');
    correlation text := nullif(current_setting('postroom.correlation_id', true), '');
    agent text := left(nullif(current_setting('postroom.user_agent', true), ''), 400);
    address inet;
BEGIN
    BEGIN
        address := coalesce(nullif(current_setting('postroom.ip', true), '')::inet, inet_client_addr());
    EXCEPTION WHEN invalid_text_representation THEN
        address := inet_client_addr();  -- what a proxy says is not worth a statement
    END;
    IF TG_OP = 'INSERT' THEN
        INSERT INTO audit_log (actor, action, object_type, object_id, changed, session, correlation_id, ip, user_agent)
        SELECT who, 'insert', TG_TABLE_NAME, e.id, e.changed, session_said, correlation, address, agent
          FROM new_rows n CROSS JOIN LATERAL postroom_audit_entry(keys, personal, ignored, NULL, to_jsonb(n)) e
         WHERE e.changed IS NOT NULL;
    ELSIF TG_OP = 'DELETE' THEN
        INSERT INTO audit_log (actor, action, object_type, object_id, changed, session, correlation_id, ip, user_agent)
        SELECT who, 'delete', TG_TABLE_NAME, e.id, e.changed, session_said, correlation, address, agent
          FROM old_rows o CROSS JOIN LATERAL postroom_audit_entry(keys, personal, ignored, to_jsonb(o), NULL) e
         WHERE e.changed IS NOT NULL;
    ELSE
        INSERT INTO audit_log (actor, action, object_type, object_id, changed, session, correlation_id, ip, user_agent)
        SELECT who, 'update', TG_TABLE_NAME, e.id, e.changed, session_said, correlation, address, agent
          FROM (SELECT to_jsonb(o) AS row FROM old_rows o) o
          FULL JOIN (SELECT to_jsonb(n) AS row FROM new_rows n) n
            ON ARRAY(SELECT o.row -> k FROM unnest(keys) AS k) = ARRAY(SELECT n.row -> k FROM unnest(keys) AS k)
         CROSS JOIN LATERAL postroom_audit_entry(keys, personal, ignored, o.row, n.row) e
         WHERE e.changed IS NOT NULL;
    END IF;
    RETURN NULL;
END $$;

-- Watches a table from now on; again, with other columns to ignore. Keys that are neither numbers nor uuids may be a
-- person's, and stand in the log as hashes.
CREATE FUNCTION postroom_audit(p_table text, p_ignored text[] DEFAULT '{}') RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    keys text[];
    personal text[];
    which record;
BEGIN
    SELECT array_agg(a.attname::text ORDER BY k.pos),
           coalesce(array_agg(a.attname::text) FILTER (
               WHERE a.atttypid <> ALL ('{int2,int4,int8,uuid}'::regtype[]::oid[])), '{}')
      INTO keys, personal
      FROM pg_index i CROSS JOIN LATERAL unnest(i.indkey) WITH ORDINALITY AS k (attnum, pos)
      JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
     WHERE i.indrelid = p_table::regclass AND i.indisprimary;
    IF keys IS NULL THEN
        RAISE EXCEPTION '% has no primary key: the log could not say which row was changed', p_table;
    END IF;
    FOR which IN SELECT * FROM (VALUES ('INSERT', 'NEW TABLE AS new_rows'), ('DELETE', 'OLD TABLE AS old_rows'),
                                       ('UPDATE', 'OLD TABLE AS old_rows NEW TABLE AS new_rows')) AS w (verb, tables)
    LOOP
        EXECUTE format('CREATE OR REPLACE TRIGGER %I AFTER %s ON %s REFERENCING %s FOR EACH STATEMENT '
                       'EXECUTE FUNCTION postroom_audit_rows(%L, %L, %L)',
                       'postroom_audit_' || lower(which.verb), which.verb, p_table::regclass, which.tables, keys,
                       personal, p_ignored);
    END LOOP;
END $$;

CREATE FUNCTION postroom_stop_audit(p_table text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY '{postroom_audit_insert,postroom_audit_delete,postroom_audit_update}'::text[] LOOP
        EXECUTE format('DROP TRIGGER IF EXISTS %I ON %s', name, p_table::regclass);
    END LOOP;
END $$;

-- Tables that are to be watched wherever they are, also those that are not there yet.
CREATE TABLE postroom_audited (
    pattern text PRIMARY KEY
);
COMMENT ON TABLE postroom_audited IS 'Names of tables, as LIKE takes them; an hourly job begins to watch what is new';
INSERT INTO postroom_audited (pattern) VALUES
    ('wallet\_accounts'), ('wallet\_entries'), ('wallet\_transactions'), ('payments'), ('payment\_intents'),
    ('momo\_transactions'), ('revolut\_transactions'), ('invoices'), ('subscriptions'), ('refunds');
SELECT postroom_protect('postroom_audited', 'r', 'rawd', 'r');

-- Begins to watch what the patterns name and nobody watches yet: the names of those tables, and why others could not be.
CREATE FUNCTION postroom_attach_audit(OUT attached text[], OUT problems text[]) LANGUAGE plpgsql AS $$
DECLARE
    name text;
BEGIN
    attached := '{}';
    problems := '{}';
    FOR name IN
        SELECT c.relname::text FROM pg_class c
         WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind IN ('r', 'p') AND NOT c.relispartition
           AND EXISTS (SELECT FROM postroom_audited a WHERE c.relname LIKE a.pattern)
           AND NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = c.oid AND t.tgname = 'postroom_audit_update')
         ORDER BY 1
    LOOP
        BEGIN
            PERFORM postroom_audit(quote_ident(name));
            attached := attached || name;
        EXCEPTION WHEN insufficient_privilege OR raise_exception THEN
            problems := problems || format('%s: %s', name, SQLERRM);
        END;
    END LOOP;
END $$;

INSERT INTO postroom_jobs (name, schedule, command) VALUES
    ('attach-audit', '20 * * * *', 'begin to watch tables that the audit log is to know of');
INSERT INTO postroom_job_names (name, job) VALUES ('attach-audit', 'attach-audit');

SELECT postroom_audit('postroom_jobs', '{followed_to,requested_at}');
SELECT postroom_audit('system_settings', '{updated_at,updated_by}');
SELECT postroom_audit('whatsapp_home_menu_items');

DO $$
BEGIN
    EXECUTE format('ALTER FUNCTION postroom_audit_rows() SET search_path = %I, pg_temp', current_schema());
END $$;
