-- name: jobs
SELECT name, schedule, active, followed_to, requested_at IS NOT NULL AS requested FROM postroom_read_jobs($1, $2);

-- name: begin
SELECT postroom_begin_job($1, $2, $3);

-- name: end
SELECT postroom_end_job($1, $2, $3, $4, $5);

-- name: settings
SELECT name, value::text::integer AS value, minimum, maximum, description, updated_at, updated_by
  FROM system_settings ORDER BY name;

-- name: clean_sessions
SELECT removed, last FROM postroom_clean_sessions($1, $2, $3, $4);

-- name: clean_dead_letters
SELECT removed, last FROM postroom_clean_dead_letters($1, $2, $3, $4);

-- name: clean_statuses
SELECT removed, last_number, last_id FROM postroom_clean_statuses($1, $2, $3, $4, $5);

-- name: clean_logs
SELECT runs, metrics FROM postroom_clean_logs($1, $2, $3);

-- name: record_metrics
SELECT postroom_record_metrics($1, $2, $3, $4, $5);

-- name: dlq_report
SELECT service, created, reprocessed, discarded, failed, still_open FROM postroom_dlq_report($1, $2);

-- name: rls_audit
SELECT table_name, policy, finding FROM postroom_rls_audit();

-- name: attach_audit
SELECT attached, problems FROM postroom_attach_audit();

-- name: list
-- Every name of every job, and its last run.
SELECT n.jobid, n.name, n.job, j.schedule, j.command, j.active, j.followed_to, j.requested_at,
       r.status AS last_status, r.start_time AS last_run, r.return_message AS last_message
  FROM postroom_job_names n JOIN postroom_jobs j ON j.name = n.job
  LEFT JOIN LATERAL (SELECT status, start_time, return_message FROM postroom_runs
                      WHERE job = j.name ORDER BY start_time DESC, runid DESC LIMIT 1) r ON true
 ORDER BY n.jobid;

-- name: runs
SELECT r.runid, r.job, r.status, r.start_time, r.end_time, r.return_message FROM postroom_runs r
 WHERE $1::text IS NULL OR r.job = (SELECT n.job FROM postroom_job_names n WHERE n.name = $1)
 ORDER BY r.start_time DESC, r.runid DESC LIMIT $2;

-- name: run_since
SELECT runid, job, status, start_time, end_time, return_message FROM postroom_runs
 WHERE job = $1 AND start_time >= $2 AND status <> 'running' ORDER BY start_time LIMIT 1;

-- name: request
SELECT postroom_request_job($1, $2, $3);

-- name: switch
SELECT postroom_switch_job($1, $2, $3, $4);

-- name: schedule
SELECT postroom_schedule_job($1, $2, $3, $4);

-- name: drop_cron_views
SELECT postroom_drop_cron_views();

-- name: change_setting
SELECT postroom_change_setting($1, $2, $3, $4);
