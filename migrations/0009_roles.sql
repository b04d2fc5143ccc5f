-- Roles: who may do what, in every table. docs/roles.md has the same table, and a test tries every cell of it.
-- router_owner owns everything and has no login; nobody works as it but migrations and what makes, archives and drops
-- partitions. router_service is the router, router_admin an operator, router_reader a dashboard. Whoever logs in is a
-- member of all four and chooses with SET ROLE.

-- No flush and no completion is under way, whose locks would be taken in another order.
SELECT pg_advisory_xact_lock(7305, 1), pg_advisory_xact_lock(7305, 2);

DO $$
DECLARE
    name text;
    maker text;
BEGIN
    FOREACH name IN ARRAY ARRAY['router_owner', 'router_service', 'router_admin', 'router_reader'] LOOP
        IF to_regrole(name) IS NULL THEN
            BEGIN
                EXECUTE format('CREATE ROLE %I NOLOGIN NOSUPERUSER NOBYPASSRLS', name);
            EXCEPTION
                WHEN duplicate_object OR unique_violation THEN
                    NULL;  -- another database of this server was faster
                WHEN insufficient_privilege THEN
                    RAISE EXCEPTION 'the role % is missing, and % may not make roles; as a superuser: '
                                    'CREATE ROLE router_owner NOLOGIN; CREATE ROLE router_service NOLOGIN; '
                                    'CREATE ROLE router_admin NOLOGIN; CREATE ROLE router_reader NOLOGIN; '
                                    'GRANT router_owner, router_service, router_admin, router_reader TO %',
                                    name, current_user, quote_ident(current_user);
            END;
        END IF;
        -- Also to whoever made the tables before, as whom processes of the version before still work.
        SELECT o.rolname INTO maker FROM pg_class c JOIN pg_roles o ON o.oid = c.relowner
         WHERE c.oid = to_regclass('wa_events') AND o.rolname <> current_user AND NOT o.rolsuper
           AND NOT pg_has_role(o.oid, name, 'MEMBER');
        IF FOUND THEN
            EXECUTE format('GRANT %I TO %I', name, maker);
        END IF;
        IF NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)
           AND NOT pg_has_role(current_user, name, 'USAGE') THEN
            BEGIN
                EXECUTE format('GRANT %I TO %I', name, current_user);
            EXCEPTION WHEN insufficient_privilege THEN
                RAISE EXCEPTION '% is no member of %; as a superuser: GRANT router_owner, router_service, router_admin, '
                                'router_reader TO %', current_user, name, quote_ident(current_user);
            END;
        END IF;
    END LOOP;
    EXECUTE format('GRANT USAGE, CREATE ON SCHEMA %I TO router_owner', current_schema());
    IF NOT has_schema_privilege('router_owner', current_schema(), 'CREATE') THEN
        RAISE EXCEPTION '% may not let router_owner make tables in the schema %; as its owner: GRANT USAGE, CREATE ON '
                        'SCHEMA % TO router_owner', current_user, current_schema(), quote_ident(current_schema());
    END IF;
    EXECUTE format('GRANT USAGE ON SCHEMA %I TO router_service, router_admin, router_reader', current_schema());
    BEGIN
        EXECUTE format('GRANT CREATE ON DATABASE %I TO router_owner', current_database());
    EXCEPTION WHEN insufficient_privilege THEN
        NULL;  -- only `postroom archive restore` makes a schema
    END;
END $$;

-- Where a policy that lets a role see every row is meant so, and why.
CREATE TABLE postroom_rls_exceptions (
    table_name text NOT NULL,
    policy     text NOT NULL,
    reason     text NOT NULL,
    PRIMARY KEY (table_name, policy)
);

-- Row-level security on a table, and what each role may do there: letters as in an ACL, r SELECT, a INSERT, w UPDATE,
-- d DELETE. A role without letters has neither a privilege nor a policy.
CREATE FUNCTION postroom_protect(p_table text, p_service text, p_admin text, p_reader text)
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    who record;
    verbs text;
BEGIN
    EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', p_table);
    EXECUTE format('REVOKE ALL ON %I FROM PUBLIC, router_service, router_admin, router_reader', p_table);
    FOR who IN SELECT * FROM (VALUES ('service', p_service), ('admin', p_admin), ('reader', p_reader))
                 AS w (role, letters) WHERE letters <> '' LOOP
        SELECT string_agg(v.verb, ', ') INTO verbs
          FROM (VALUES ('r', 'SELECT'), ('a', 'INSERT'), ('w', 'UPDATE'), ('d', 'DELETE')) AS v (letter, verb)
         WHERE strpos(who.letters, v.letter) > 0;
        EXECUTE format('GRANT %s ON %I TO %I', verbs, p_table, 'router_' || who.role);
        EXECUTE format('DROP POLICY IF EXISTS %I ON %I', 'postroom_' || who.role, p_table);
        EXECUTE format('CREATE POLICY %I ON %I TO %I USING (true)%s', 'postroom_' || who.role, p_table,
                       'router_' || who.role, CASE WHEN who.letters = 'r' THEN '' ELSE ' WITH CHECK (true)' END);
        INSERT INTO postroom_rls_exceptions (table_name, policy, reason)
        VALUES (p_table, 'postroom_' || who.role, 'one business has the database; roles differ in tables and verbs')
            ON CONFLICT DO NOTHING;
    END LOOP;
END $$;

SELECT postroom_protect(t.name, t.service, t.admin, t.reader) FROM (VALUES
    ('wa_events',                'ra',   'r',    'r'),
    ('whatsapp_messages_items',  'ra',   'rw',   'r'),
    ('message_outcomes',         'raw',  'rw',   'r'),
    ('journal_head',             'rw',   'rw',   'r'),
    ('journal_writers',          'rawd', 'r',    'r'),
    ('journal_stragglers',       'rad',  'r',    'r'),
    ('dedup_ledger_0',           'ra',   'rd',   ''),
    ('dedup_ledger_1',           'ra',   'rd',   ''),
    ('dedup_generation',         'r',    'r',    'r'),
    ('session_names',            'raw',  'r',    'r'),
    ('user_sessions',            'rawd', 'r',    'r'),
    ('whatsapp_statuses',        'rawd', 'r',    'r'),
    ('whatsapp_outbox',          'raw',  'r',    'r'),
    ('webhook_dlq',              'rawd', 'rw',   ''),
    ('delivery_tallies',         'rw',   'rw',   'r'),
    ('leases',                   'rw',   'r',    'r'),
    ('whatsapp_home_menu_items', 'r',    'rawd', 'r'),
    ('dlq_processing_log',       'rad',  'r',    'r'),
    ('postroom_jobs',            'rw',   'rw',   'r'),
    ('postroom_job_names',       'r',    'r',    'r'),
    ('postroom_job_runs',        'rawd', 'r',    'r'),
    ('system_settings',          'r',    'rw',   'r'),
    ('service_metrics',          'rad',  'r',    'r'),
    ('postroom_archives',        'rw',   'rw',   'r'),
    ('audit_log',                'a',    'ra',   ''),
    ('postroom_keys',            'r',    'r',    ''),
    ('postroom_migrations',      'r',    'r',    'r'),
    ('postroom_rls_exceptions',  'r',    'r',    'r')
) AS t (name, service, admin, reader);

-- A partition is reached through its table, whose policies and privileges hold then. By its own name nobody but the
-- owner reaches it.
CREATE OR REPLACE FUNCTION postroom_make_partition(p_parent text, p_name text, p_from timestamptz, p_to timestamptz)
RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    IF to_regclass(p_name) IS NOT NULL THEN
        RETURN false;
    END IF;
    EXECUTE format('CREATE TABLE %I (LIKE %I INCLUDING DEFAULTS INCLUDING CONSTRAINTS) '
                   'WITH (autovacuum_vacuum_insert_scale_factor = 0.1, autovacuum_analyze_scale_factor = 0.05)',
                   p_name, p_parent);
    EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', p_name);
    EXECUTE format('ALTER TABLE %I OWNER TO router_owner', p_name);  -- also when somebody made it by hand
    EXECUTE format('ALTER TABLE %I ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
                   p_parent, p_name, p_from, p_to);
    RETURN true;
END $$;

-- Views look with the eyes of who asks. Those of 0007 may be there or not.
CREATE FUNCTION postroom_grant_cron_views() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM pg_views WHERE schemaname = 'cron' AND viewname = 'job') THEN
        GRANT USAGE ON SCHEMA cron TO router_service, router_admin, router_reader;
        GRANT SELECT ON cron.job, cron.job_run_details TO router_service, router_admin, router_reader;
        GRANT UPDATE ON cron.job TO router_admin;
        ALTER SCHEMA cron OWNER TO router_owner;
        ALTER VIEW cron.job OWNER TO router_owner;
        ALTER VIEW cron.job_run_details OWNER TO router_owner;
    END IF;
END $$;
SELECT postroom_grant_cron_views();

-- Where pg_cron itself is installed, the same statements ask it; its own policies say which of its jobs they see.
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_extension WHERE extname = 'pg_cron') THEN
        GRANT USAGE ON SCHEMA cron TO router_admin, router_reader;
        GRANT SELECT ON cron.job, cron.job_run_details TO router_admin, router_reader;
    END IF;
EXCEPTION WHEN insufficient_privilege THEN
    RAISE NOTICE 'the schema cron is pg_cron''s; its owner may let router_admin and router_reader read it';
END $$;
GRANT SELECT ON whatsapp_messages, processed_webhook_messages, postroom_runs, postroom_archived_tallies
    TO router_service, router_admin, router_reader;
GRANT SELECT ON wa_dead_letter_queue TO router_service, router_admin;

-- Findings about tables of this schema: each of them is a way to rows that nobody meant to open.
CREATE FUNCTION postroom_rls_audit() RETURNS TABLE (table_name text, policy text, finding text)
LANGUAGE sql STABLE AS $$
    WITH tables AS (
        SELECT c.oid, c.relname::text AS name, c.relrowsecurity, c.relispartition, c.relacl, c.relowner
          FROM pg_class c
         WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind IN ('r', 'p')
           AND NOT EXISTS (SELECT FROM postroom_archives a  -- on their way out: the owner's alone, as partitions are
                            WHERE a.state <> 'archived' AND c.relname = ANY (a.partitions))
    ), policies AS (
        SELECT t.name, p.polname::text AS policy, p.polroles, pg_get_expr(p.polqual, p.polrelid) AS qual,
               pg_get_expr(p.polwithcheck, p.polrelid) AS with_check
          FROM tables t JOIN pg_policy p ON p.polrelid = t.oid
    )
    SELECT t.name, NULL, 'no row-level security' FROM tables t WHERE NOT t.relrowsecurity
    UNION ALL
    SELECT t.name, NULL, 'no policy' FROM tables t
     WHERE NOT t.relispartition AND NOT EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = t.oid)
    UNION ALL
    SELECT t.name, NULL, 'a partition that can be reached by its own name' FROM tables t
     WHERE t.relispartition AND EXISTS (SELECT FROM aclexplode(t.relacl) a WHERE a.grantee <> t.relowner)
    UNION ALL
    SELECT p.name, p.policy, 'a policy for PUBLIC' FROM policies p WHERE 0 = ANY (p.polroles)
    UNION ALL
    SELECT p.name, p.policy, 'a policy that is true for every row' FROM policies p
     WHERE (p.qual = 'true' OR p.with_check = 'true')
       AND NOT EXISTS (SELECT FROM postroom_rls_exceptions e WHERE e.table_name = p.name AND e.policy = p.policy)
     ORDER BY 1, 2, 3
$$;

INSERT INTO postroom_jobs (name, schedule, command) VALUES
    ('rls-audit', '0 6 * * 1', 'look for tables whose rows are open to somebody by mistake');
INSERT INTO postroom_job_names (name, job) VALUES ('rls-audit', 'rls-audit');

-- Everything of ours belongs to router_owner from here on, and later migrations run as it.
DO $$
DECLARE
    statements text[];
    statement text;
BEGIN
    statements := ARRAY(
        SELECT format('ALTER TABLE %I OWNER TO router_owner', t.name) FROM (
            SELECT DISTINCT table_name AS name FROM postroom_rls_exceptions
            UNION
            SELECT p.name FROM unnest('{wa_events,whatsapp_messages_items,message_outcomes}'::text[]) AS parent
             CROSS JOIN LATERAL postroom_partitions(parent) p) t
        UNION ALL
        SELECT format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', p.name)
          FROM unnest('{wa_events,whatsapp_messages_items,message_outcomes}'::text[]) AS parent
         CROSS JOIN LATERAL postroom_partitions(parent) p
        UNION ALL
        SELECT format('ALTER TABLE %I OWNER TO router_owner', part.name)
          FROM postroom_archives a CROSS JOIN LATERAL unnest(a.partitions) AS part (name)
         WHERE a.state <> 'archived' AND to_regclass(quote_ident(part.name)) IS NOT NULL
           AND NOT postroom_is_attached(part.name)
        UNION ALL
        SELECT format('ALTER VIEW %I OWNER TO router_owner', v.name)
          FROM unnest('{whatsapp_messages,processed_webhook_messages,wa_dead_letter_queue,postroom_runs,'
                      'postroom_archived_tallies}'::text[]) AS v (name)
        UNION ALL
        SELECT format('ALTER TYPE %I OWNER TO router_owner', y.name)
          FROM unnest('{postroom_event,postroom_item}'::text[]) AS y (name)
        UNION ALL
        SELECT format('ALTER FUNCTION %s OWNER TO router_owner', p.oid::regprocedure) FROM pg_proc p
         WHERE p.pronamespace = current_schema()::regnamespace
           AND (p.proname LIKE 'postroom\_%' OR p.proname IN ('create_wa_events_partition', 'process_dlq_entries')));
    FOREACH statement IN ARRAY statements LOOP
        EXECUTE statement;
    END LOOP;
    -- These change the schema for whoever may call them, and look for nothing outside of it.
    FOR statement IN
        SELECT format('ALTER FUNCTION %s SECURITY DEFINER SET search_path = %I, pg_temp', f.name, current_schema())
          FROM unnest('{create_wa_events_partition(),postroom_drop_cron_views()}'::text[]) AS f (name)
        UNION ALL
        SELECT format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', f.name)
          FROM unnest('{create_wa_events_partition(),postroom_drop_cron_views()}'::text[]) AS f (name)
    LOOP
        EXECUTE statement;
    END LOOP;
    GRANT EXECUTE ON FUNCTION create_wa_events_partition() TO router_service, router_admin;
    GRANT EXECUTE ON FUNCTION postroom_drop_cron_views() TO router_admin;
END $$;
