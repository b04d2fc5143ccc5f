-- Jobs: what is done when, who may switch it, and every run on record. Whoever delivers runs them, fenced by its epoch.
-- The functions of the retrier that are here again are those of 0006, told of its switch.

CREATE TABLE postroom_jobs (
    name         text PRIMARY KEY,
    schedule     text NOT NULL,
    command      text NOT NULL,
    active       boolean NOT NULL DEFAULT true,
    followed_to  timestamptz,
    requested_at timestamptz
);
COMMENT ON TABLE postroom_jobs IS 'schedule: a cron expression of five fields, in UTC; command says what the job does';
COMMENT ON COLUMN postroom_jobs.followed_to IS
    'The schedule was followed up to here; null: it is from the next look on, as after the job was switched on';

CREATE TABLE postroom_job_names (
    jobid bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name  text NOT NULL UNIQUE,
    job   text NOT NULL REFERENCES postroom_jobs (name)
);
COMMENT ON TABLE postroom_job_names IS 'A job may have several names; what is done to it by one is done to it by all';

CREATE TABLE postroom_job_runs (
    runid          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job            text NOT NULL REFERENCES postroom_jobs (name),
    status         text NOT NULL CHECK (status IN ('running', 'succeeded', 'failed')),
    start_time     timestamptz NOT NULL,
    end_time       timestamptz,
    return_message text,
    epoch          bigint NOT NULL
);
CREATE INDEX postroom_job_runs_job ON postroom_job_runs (job, start_time);
CREATE INDEX postroom_job_runs_start_time ON postroom_job_runs (start_time);

INSERT INTO postroom_jobs (name, schedule, command) VALUES
    ('process-dlq-entries', '*/5 * * * *', 'retry dead letters that are due; also when the next one is, and when asked'),
    ('session-cleanup', '0 2 * * *', 'remove idle sessions, processed dead letters, old statuses, run logs and metrics'),
    ('create-wa-events-partitions', '10 * * * *', 'make the partitions of the weeks and months ahead'),
    ('dlq-report', '30 6 * * 1', 'say what became of the dead letters of the week before');
INSERT INTO postroom_job_names (name, job) VALUES
    ('process-dlq-entries', 'process-dlq-entries'), ('dlq-processor', 'process-dlq-entries'),
    ('session-cleanup', 'session-cleanup'), ('create-wa-events-partitions', 'create-wa-events-partitions'),
    ('dlq-report', 'dlq-report');

CREATE TABLE system_settings (
    name        text PRIMARY KEY,
    value       jsonb NOT NULL,
    minimum     integer NOT NULL,
    maximum     integer NOT NULL,
    description text NOT NULL,
    updated_at  timestamptz,
    updated_by  text,
    CONSTRAINT whole_number_within_its_bounds CHECK (
        jsonb_typeof(value) = 'number' AND value::text ~ '^[0-9]{1,9}$'
        AND value::text::integer BETWEEN minimum AND maximum)
);
COMMENT ON TABLE system_settings IS 'Read by each run of a job: a change needs no restart';
INSERT INTO system_settings (name, value, minimum, maximum, description) VALUES
    ('processed_dead_letters_days', '7', 1, 3650, 'dead letters that were reprocessed or discarded are removed after'),
    ('statuses_days', '30', 8, 3650, 'the status of an outbound message is removed so long after it last changed'),
    ('run_log_days', '30', 1, 3650, 'runs of jobs and of the retrier are removed after'),
    ('metrics_days', '30', 1, 3650, 'rows of service_metrics are removed after');

CREATE TABLE service_metrics (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    recorded_at timestamptz NOT NULL,
    service     text NOT NULL,
    metric      text NOT NULL,
    value       double precision NOT NULL
);
CREATE INDEX service_metrics_recorded_at ON service_metrics (recorded_at);
COMMENT ON TABLE service_metrics IS 'What jobs counted. service: a domain, or the job that counted for all of them';

-- A change is heard of at once, and a job that is switched on follows its schedule from then on.
CREATE FUNCTION postroom_job_changes() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (NEW.active AND NOT OLD.active) OR NEW.schedule <> OLD.schedule THEN
        NEW.followed_to := NULL;
    END IF;
    NOTIFY postroom_jobs;
    IF NEW.name = 'process-dlq-entries' THEN
        PERFORM process_dlq_entries();
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER postroom_job_changes BEFORE UPDATE ON postroom_jobs FOR EACH ROW
    WHEN (NEW.active <> OLD.active OR NEW.schedule <> OLD.schedule
          OR (NEW.requested_at IS NOT NULL AND NEW.requested_at IS DISTINCT FROM OLD.requested_at))
    EXECUTE FUNCTION postroom_job_changes();

-- For whoever runs them.

CREATE FUNCTION postroom_read_jobs(p_epoch bigint, p_now timestamptz)
RETURNS SETOF postroom_jobs LANGUAGE plpgsql AS $$
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    -- One that was followed by a clock that had leapt ahead would not be due until that time comes.
    UPDATE postroom_jobs SET followed_to = p_now WHERE followed_to IS NULL OR followed_to > p_now + interval '1 hour';
    RETURN QUERY SELECT * FROM postroom_jobs;
END $$;

CREATE FUNCTION postroom_begin_job(p_epoch bigint, p_now timestamptz, p_name text) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    run bigint;
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    UPDATE postroom_job_runs
       SET status = 'failed', end_time = p_now, return_message = 'interrupted: the process that ran it is gone'
     WHERE job = p_name AND status = 'running';
    UPDATE postroom_jobs SET followed_to = p_now, requested_at = NULL WHERE name = p_name;
    INSERT INTO postroom_job_runs (job, status, start_time, epoch) VALUES (p_name, 'running', p_now, p_epoch)
    RETURNING runid INTO run;
    RETURN run;
END $$;

CREATE FUNCTION postroom_end_job(p_epoch bigint, p_now timestamptz, p_run bigint, p_failed boolean, p_message text)
RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    UPDATE postroom_job_runs
       SET status = CASE WHEN p_failed THEN 'failed' ELSE 'succeeded' END, end_time = p_now,
           return_message = p_message
     WHERE runid = p_run AND status = 'running';
END $$;

-- For operators; each returns the job's own name, or null when there is none of that name.

CREATE FUNCTION postroom_request_job(p_now timestamptz, p_actor text, p_name text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    found text;
BEGIN
    UPDATE postroom_jobs j SET requested_at = p_now
      FROM postroom_job_names n WHERE n.name = p_name AND j.name = n.job RETURNING j.name INTO found;
    INSERT INTO audit_log (acted_at, actor, action, object_type, object_id)
    SELECT p_now, p_actor, 'job.run', 'postroom_jobs', found WHERE found IS NOT NULL;
    RETURN found;
END $$;

CREATE FUNCTION postroom_switch_job(p_now timestamptz, p_actor text, p_name text, p_active boolean)
RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    found text;
BEGIN
    UPDATE postroom_jobs j SET active = p_active
      FROM postroom_job_names n WHERE n.name = p_name AND j.name = n.job RETURNING j.name INTO found;
    INSERT INTO audit_log (acted_at, actor, action, object_type, object_id)
    SELECT p_now, p_actor, CASE WHEN p_active THEN 'job.enable' ELSE 'job.disable' END, 'postroom_jobs', found
     WHERE found IS NOT NULL;
    RETURN found;
END $$;

CREATE FUNCTION postroom_schedule_job(p_now timestamptz, p_actor text, p_name text, p_schedule text)
RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    found text;
BEGIN
    UPDATE postroom_jobs j SET schedule = p_schedule
      FROM postroom_job_names n WHERE n.name = p_name AND j.name = n.job RETURNING j.name INTO found;
    INSERT INTO audit_log (acted_at, actor, action, object_type, object_id, detail)
    SELECT p_now, p_actor, 'job.schedule', 'postroom_jobs', found, jsonb_build_object('schedule', p_schedule)
     WHERE found IS NOT NULL;
    RETURN found;
END $$;

CREATE FUNCTION postroom_change_setting(p_now timestamptz, p_actor text, p_name text, p_value integer)
RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    UPDATE system_settings SET value = to_jsonb(p_value), updated_at = p_now, updated_by = p_actor WHERE name = p_name;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO audit_log (acted_at, actor, action, object_type, object_id, detail)
    VALUES (p_now, p_actor, 'setting.change', 'system_settings', p_name, jsonb_build_object('value', p_value));
    RETURN true;
END $$;

ALTER TABLE dlq_processing_log ADD COLUMN started_at timestamptz;

-- Every run, those of the retrier too, which keeps a log of its own. The two logs number their runs each by itself: odd
-- numbers are the retrier's here.
CREATE VIEW postroom_runs WITH (security_invoker = true) AS
SELECT runid * 2 AS runid, job, status, start_time, end_time, return_message FROM postroom_job_runs
UNION ALL
SELECT id * 2 + 1, 'process-dlq-entries', CASE status WHEN 'completed' THEN 'succeeded' ELSE status END,
       coalesce(started_at, processed_at), processed_at,
       coalesce(error_message, format('%s processed, %s of them failed again', entries_processed, entries_failed))
  FROM dlq_processing_log;

-- Housekeeping. Each page is a transaction of its own; `last` is where the next one begins, null at the end.

CREATE FUNCTION postroom_clean_sessions(
    p_epoch bigint, p_before timestamptz, p_after text, p_limit integer, OUT removed integer, OUT last text
) LANGUAGE plpgsql SET enable_seqscan = off AS $$
DECLARE
    page text[];
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    page := ARRAY(SELECT session_key FROM user_sessions WHERE session_key > p_after ORDER BY session_key LIMIT p_limit);
    DELETE FROM user_sessions WHERE session_key = ANY (page) AND last_interaction < p_before;
    GET DIAGNOSTICS removed = ROW_COUNT;
    last := page[cardinality(page)];
END $$;

CREATE FUNCTION postroom_clean_dead_letters(
    p_epoch bigint, p_before timestamptz, p_after bigint, p_limit integer, OUT removed integer, OUT last bigint
) LANGUAGE plpgsql SET enable_seqscan = off AS $$
DECLARE
    page bigint[];
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    page := ARRAY(SELECT seq FROM webhook_dlq WHERE seq > p_after ORDER BY seq LIMIT p_limit);
    DELETE FROM webhook_dlq
     WHERE seq = ANY (page) AND updated_at < p_before AND (status = 'reprocessed' OR resolution = 'discarded');
    GET DIAGNOSTICS removed = ROW_COUNT;
    last := page[cardinality(page)];
END $$;

CREATE FUNCTION postroom_clean_statuses(
    p_epoch bigint, p_before timestamptz, p_after_number text, p_after_id text, p_limit integer,
    OUT removed integer, OUT last_number text, OUT last_id text
) LANGUAGE plpgsql SET enable_seqscan = off AS $$
DECLARE
    numbers text[];
    ids text[];
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    SELECT array_agg(s.phone_number_id ORDER BY s.phone_number_id, s.message_id),
           array_agg(s.message_id ORDER BY s.phone_number_id, s.message_id)
      INTO numbers, ids
      FROM (SELECT phone_number_id, message_id FROM whatsapp_statuses
             WHERE (phone_number_id, message_id) > (p_after_number, p_after_id)
             ORDER BY phone_number_id, message_id LIMIT p_limit) s;
    DELETE FROM whatsapp_statuses s USING unnest(numbers, ids) AS p (number, id)
     WHERE s.phone_number_id = p.number AND s.message_id = p.id AND s.recorded_at < p_before;
    GET DIAGNOSTICS removed = ROW_COUNT;
    last_number := numbers[cardinality(numbers)];
    last_id := ids[cardinality(ids)];
END $$;

CREATE FUNCTION postroom_clean_logs(
    p_epoch bigint, p_runs_before timestamptz, p_metrics_before timestamptz, OUT runs integer, OUT metrics integer
) LANGUAGE plpgsql AS $$
DECLARE
    retries integer;
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    DELETE FROM postroom_job_runs WHERE start_time < p_runs_before AND status <> 'running';
    GET DIAGNOSTICS runs = ROW_COUNT;
    DELETE FROM dlq_processing_log WHERE processed_at < p_runs_before;
    GET DIAGNOSTICS retries = ROW_COUNT;
    runs := runs + retries;
    DELETE FROM service_metrics WHERE recorded_at < p_metrics_before;
    GET DIAGNOSTICS metrics = ROW_COUNT;
END $$;

CREATE FUNCTION postroom_record_metrics(
    p_epoch bigint, p_now timestamptz, p_service text[], p_metric text[], p_value double precision[]
) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    INSERT INTO service_metrics (recorded_at, service, metric, value)
    SELECT p_now, m.service, m.metric, m.value FROM unnest(p_service, p_metric, p_value) AS m (service, metric, value);
END $$;

-- The dead letters that came to be in that time, by service, and where they are now.
CREATE FUNCTION postroom_dlq_report(p_from timestamptz, p_to timestamptz)
RETURNS TABLE (service text, created bigint, reprocessed bigint, discarded bigint, failed bigint, still_open bigint)
LANGUAGE sql STABLE AS $$
    SELECT d.service, count(*), count(*) FILTER (WHERE d.status = 'reprocessed'),
           count(*) FILTER (WHERE d.resolution = 'discarded'),
           count(*) FILTER (WHERE d.status = 'failed' AND d.resolution IS DISTINCT FROM 'discarded'),
           count(*) FILTER (WHERE d.status IN ('pending', 'processing'))
      FROM webhook_dlq d WHERE d.created_at >= p_from AND d.created_at < p_to
     GROUP BY d.service ORDER BY d.service
$$;

-- For those whose dashboards know dead letters by this name.
CREATE VIEW wa_dead_letter_queue WITH (security_invoker = true) AS
SELECT id, phone_number, service, payload, error_message, retry_count, status, resolution, created_at, updated_at,
       message_id, status = 'reprocessed' OR resolution IS NOT DISTINCT FROM 'discarded' AS processed
  FROM webhook_dlq;

-- The retrier. While its job is switched off, a letter goes only when somebody asked for it, or for a run. What was
-- deferred goes all the same: it has not failed, it waits for its turn.

CREATE FUNCTION postroom_retries() RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT coalesce((SELECT active OR requested_at IS NOT NULL FROM postroom_jobs WHERE name = 'process-dlq-entries'),
                    true)
$$;

CREATE OR REPLACE FUNCTION postroom_claim_dead_letters(
    p_epoch bigint, p_now timestamptz, p_limit integer, p_services text[], p_others boolean
) RETURNS SETOF webhook_dlq LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
DECLARE
    wanted text[] := p_services;
    retries boolean := postroom_retries();
    chosen uuid[];
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    IF p_others THEN
        wanted := ARRAY(SELECT s.service FROM postroom_open_services() AS s (service)
                         WHERE s.service <> ALL (p_services));
    END IF;
    WITH heads AS MATERIALIZED (
        SELECT h AS head, h.retry_requested_at IS NOT NULL
               OR (NOT p_others AND (retries OR h.resolution IS NOT DISTINCT FROM 'deferred')
                   AND coalesce(postroom_is_due(h, p_now), false)) AS goes
          FROM postroom_heads(wanted) h
         WHERE NOT EXISTS (SELECT FROM webhook_dlq p
                            WHERE p.service = h.service AND p.session_key = h.session_key
                              AND p.status = 'processing')
    ), found AS (
        SELECT (h.head).id, (h.head).attempts, (h.head).seq FROM heads h WHERE h.goes
        UNION ALL
        SELECT next.id, next.attempts, next.seq
          FROM heads h CROSS JOIN LATERAL (
            SELECT c.id, c.attempts, c.seq FROM postroom_behind(h.head) c
             WHERE c.status = 'pending'
               AND (c.retry_requested_at IS NOT NULL
                    OR (NOT p_others AND (retries OR c.resolution IS NOT DISTINCT FROM 'deferred')
                        AND postroom_is_due(c, p_now)))
               AND NOT EXISTS (
                    SELECT FROM webhook_dlq o
                     WHERE o.session_key = c.session_key AND o.service = c.service
                       AND o.status IN ('pending', 'processing') AND o.seq < c.seq
                       AND (o.keeps_order
                            -- What was deferred goes past an older one. What nobody asked for waits for any such,
                            -- what somebody asked for only for one that goes now.
                            OR (c.resolution IS DISTINCT FROM 'deferred'
                                AND (c.retry_requested_at IS NULL OR o.retry_requested_at IS NOT NULL))))
             ORDER BY c.seq LIMIT 1) next
         WHERE NOT h.goes AND NOT (h.head).keeps_order
    )
    -- A single one is, of the oldest, the one that was attempted least: it may be that the one before it is what the
    -- service stumbles over.
    SELECT array_agg(o.id) INTO chosen FROM (
        SELECT f.id FROM (SELECT * FROM found ORDER BY seq LIMIT greatest(p_limit, 50)) f
         ORDER BY CASE WHEN p_limit = 1 THEN f.attempts END, f.seq LIMIT p_limit) o;
    RETURN QUERY
    UPDATE webhook_dlq d
       SET status = 'processing', claimed_epoch = p_epoch, updated_at = p_now
     WHERE d.id = ANY (chosen) AND d.status = 'pending'
    RETURNING d.*;
END $$;

CREATE FUNCTION postroom_log_retry_run(
    p_epoch bigint, p_started timestamptz, p_now timestamptz, p_processed integer, p_failed integer, p_error text,
    p_services text[]
) RETURNS TABLE (service text, due timestamptz) LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
DECLARE
    retries boolean;
BEGIN
    PERFORM postroom_require_epoch(p_epoch);
    INSERT INTO dlq_processing_log (started_at, processed_at, status, entries_processed, entries_failed, error_message)
    VALUES (p_started, p_now, CASE WHEN p_error IS NULL THEN 'completed' ELSE 'failed' END, p_processed, p_failed,
            p_error);
    UPDATE postroom_jobs SET requested_at = NULL WHERE name = 'process-dlq-entries' AND requested_at < p_started;
    retries := postroom_retries();
    RETURN QUERY
    WITH heads AS MATERIALIZED (
        SELECT h AS head FROM postroom_heads(ARRAY(SELECT postroom_open_services())) h
    ), letters AS (
        SELECT (h.head).service, (h.head).status, (h.head).resolution, (h.head).retry_requested_at,
               (h.head).next_retry_at
          FROM heads h
        UNION ALL
        SELECT b.service, b.status, b.resolution, b.retry_requested_at, b.next_retry_at
          FROM heads h CROSS JOIN LATERAL postroom_behind(h.head) b
         WHERE NOT (h.head).keeps_order
           AND (b.retry_requested_at IS NOT NULL OR b.resolution = 'deferred')
           AND NOT EXISTS (SELECT FROM webhook_dlq o
                            WHERE o.session_key = b.session_key AND o.service = b.service
                              AND o.status IN ('pending', 'processing') AND o.seq < b.seq AND o.keeps_order)
    )
    SELECT l.service, min(CASE WHEN l.retry_requested_at IS NOT NULL OR l.resolution IN ('no_service', 'deferred')
                               THEN p_now ELSE l.next_retry_at END)
      FROM letters l
     WHERE l.status = 'pending'
       AND (l.retry_requested_at IS NOT NULL
            OR (l.service = ANY (p_services) AND (retries OR l.resolution IS NOT DISTINCT FROM 'deferred')))
     GROUP BY l.service
    HAVING min(CASE WHEN l.retry_requested_at IS NOT NULL OR l.resolution IN ('no_service', 'deferred')
                    THEN p_now ELSE l.next_retry_at END) IS NOT NULL;
END $$;

-- What a process of the version before calls for as long as it runs.
CREATE OR REPLACE FUNCTION postroom_log_retry_run(
    p_epoch bigint, p_now timestamptz, p_processed integer, p_failed integer, p_error text, p_services text[]
) RETURNS TABLE (service text, due timestamptz) LANGUAGE sql AS $$
    SELECT r.service, r.due FROM postroom_log_retry_run(p_epoch, p_now, p_now, p_processed, p_failed, p_error,
                                                        p_services) r
$$;

-- Jobs as pg_cron shows its own, for those who have none: operators' statements and dashboards run unchanged. A schema
-- `cron` that is there already is somebody else's. postroom_drop_cron_views() makes room for the extension.

CREATE FUNCTION postroom_cron_job_update() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (to_jsonb(NEW) - 'active') <> (to_jsonb(OLD) - 'active') THEN
        RAISE EXCEPTION 'of cron.job only "active" can be changed; for a schedule there is: postroom jobs schedule';
    END IF;
    UPDATE postroom_jobs j SET active = NEW.active
      FROM postroom_job_names n WHERE n.jobid = NEW.jobid AND j.name = n.job AND j.active <> NEW.active;
    RETURN NEW;
END $$;

CREATE FUNCTION postroom_make_cron_views() RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM pg_namespace WHERE nspname = 'cron') THEN
        RETURN false;
    END IF;
    CREATE SCHEMA cron;
    COMMENT ON SCHEMA cron IS 'Postroom''s jobs as pg_cron shows its own; postroom jobs drop-cron-views removes it';
    CREATE VIEW cron.job WITH (security_invoker = true) AS
    SELECT n.jobid, j.schedule, j.command, 'localhost'::text AS nodename,
           current_setting('port')::integer AS nodeport, current_database()::text AS database,
           'postroom'::text AS username, j.active, n.name AS jobname,
           (SELECT max(r.start_time) FROM postroom_runs r WHERE r.job = j.name) AS last_run
      FROM postroom_job_names n JOIN postroom_jobs j ON j.name = n.job;
    CREATE TRIGGER postroom_cron_job_update INSTEAD OF UPDATE ON cron.job FOR EACH ROW
        EXECUTE FUNCTION postroom_cron_job_update();
    CREATE VIEW cron.job_run_details WITH (security_invoker = true) AS
    SELECT n.jobid, r.runid, NULL::integer AS job_pid, current_database()::text AS database,
           'postroom'::text AS username, j.command, r.status, r.return_message, r.start_time, r.end_time,
           n.name AS jobname
      FROM postroom_runs r JOIN postroom_jobs j ON j.name = r.job JOIN postroom_job_names n ON n.job = r.job;
    RETURN true;
EXCEPTION WHEN insufficient_privilege THEN
    -- May not make schemas here: the commands show jobs all the same.
    RETURN false;
END $$;

CREATE FUNCTION postroom_drop_cron_views() RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_views WHERE schemaname = 'cron' AND viewname = 'job') THEN
        RETURN false;
    END IF;
    DROP VIEW cron.job, cron.job_run_details;
    DROP SCHEMA cron;
    RETURN true;
END $$;

SELECT postroom_make_cron_views();

-- Called by triggers of statements from any session, whose search path may be another.
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY '{postroom_job_changes(),postroom_cron_job_update(),process_dlq_entries()}'::text[] LOOP
        EXECUTE format('ALTER FUNCTION %s SET search_path = %I, pg_temp', name, current_schema());
    END LOOP;
END $$;
