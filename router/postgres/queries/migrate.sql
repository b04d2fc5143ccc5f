-- name: lock
SELECT pg_advisory_lock(7305, 5);

-- name: unlock
SELECT pg_advisory_unlock(7305, 5);

-- name: create_schema
SELECT format('CREATE SCHEMA IF NOT EXISTS %I', $1::text);

-- name: has_history
SELECT to_regclass('postroom_migrations') IS NOT NULL;

-- name: has_owner
-- From 0009 on everything belongs to a role of its own, and so does what is made later.
SELECT coalesce((SELECT pg_get_userbyid(relowner) = 'router_owner' FROM pg_class
                  WHERE oid = to_regclass('postroom_migrations')), false);

-- name: become_owner
SET LOCAL ROLE router_owner;

-- name: foreign_tables
SELECT relname AS name FROM pg_class
 WHERE relnamespace = current_schema()::regnamespace
   AND relname IN ('wa_events', 'whatsapp_messages', 'whatsapp_messages_items', 'message_outcomes', 'user_sessions',
                   'webhook_dlq', 'processed_webhook_messages', 'journal_head', 'leases', 'session_names',
                   'whatsapp_outbox', 'whatsapp_statuses', 'whatsapp_home_menu_items', 'dlq_processing_log',
                   'wa_dead_letter_queue', 'audit_log', 'system_settings', 'service_metrics', 'service_versions',
                   'service_secrets', 'status_subscriptions', 'status_deliveries')
 ORDER BY relname;

-- name: make_history
CREATE TABLE IF NOT EXISTS postroom_migrations (
    version    integer PRIMARY KEY,
    name       text NOT NULL,
    checksum   text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
);

-- name: history
SELECT version, checksum FROM postroom_migrations ORDER BY version;

-- name: record
INSERT INTO postroom_migrations (version, name, checksum) VALUES ($1, $2, $3);
