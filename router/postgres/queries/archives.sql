-- name: next_archive
SELECT name, kind, partitions, from_at, until_at, state, tables::text AS tables
  FROM postroom_next_archive($1, $2, $3);

-- name: held_partitions
SELECT postroom_held_partitions($1);

-- name: detach_statement
SELECT postroom_detach_statement($1, $2);

-- name: begin_writing
SELECT postroom_begin_writing($1, $2);

-- name: archive_written
SELECT postroom_archive_written($1, $2, $3, $4);

-- name: write_again
SELECT postroom_write_again($1, $2);

-- name: drop_archived
SELECT postroom_drop_archived($1, $2, $3);

-- name: columns
SELECT name, type FROM postroom_columns($1);

-- name: items_page
SELECT * FROM postroom_items_page($1, $2, $3);

-- name: outcomes_page
SELECT * FROM postroom_outcomes_page($1, $2, $3);

-- name: events_page
SELECT * FROM postroom_events_page($1, $2, $3, $4);

-- name: bodies_page
SELECT * FROM postroom_bodies_page($1, $2, $3, $4, $5);

-- name: replies_page
SELECT * FROM postroom_replies_page($1, $2, $3, $4);

-- name: analyze
-- Autovacuum looks at partitions, never at the tables that they are of.
ANALYZE wa_events, whatsapp_messages_items, message_outcomes;

-- name: list
SELECT name, kind, from_at, until_at, state, location, tables::text AS tables, begun_at, archived_at
  FROM postroom_archives ORDER BY from_at, kind DESC, name;

-- name: restored
SELECT c.relname::text AS name FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = $1 AND c.relname = ANY ($2::text[]) ORDER BY c.relname;

-- name: make_restored
SELECT postroom_make_restored($1, $2, $3, $4);

-- name: names_of
-- What the person with one of these names is known by.
SELECT DISTINCT o.name FROM session_names n JOIN session_names o ON o.session_key = n.session_key
 WHERE n.name = $1;
