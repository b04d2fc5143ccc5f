-- name: select
SELECT d.id, d.phone_number, d.service, d.status, d.resolution, d.error_message, d.retry_count, d.attempts,
       d.revision, d.next_retry_at, d.created_at, d.updated_at, d.seq, d.message_id, d.session_key,
       d.correlation_id, d.payload::text AS payload
  FROM postroom_select_dead_letters($1, $2, $3, $4, $5, $6, $7) d;

-- name: choose
SELECT d.id FROM postroom_select_dead_letters($1, $2, $3, $4, $5, $6, $7) d
 WHERE postroom_can_be_acted_on(d.status, d.resolution);

-- name: retry
SELECT postroom_retry_dead_letters($1, $2, $3);

-- name: discard
SELECT postroom_discard_dead_letters($1, $2, $3, $4);

-- name: edit
SELECT postroom_edit_dead_letter($1, $2, $3, $4);
