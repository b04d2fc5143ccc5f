-- name: list
-- Newest first.
SELECT id, acted_at, actor, action, object_type, object_id, changed, detail::text AS detail, session, correlation_id,
       host(ip) AS ip, user_agent
  FROM audit_log
 WHERE ($1::text IS NULL OR object_type = $1)
   AND ($2::text IS NULL OR object_id IN ($2, (SELECT postroom_subject_hash($2))))
   AND ($3::timestamptz IS NULL OR acted_at >= $3)
 ORDER BY id DESC LIMIT $4;

-- name: watch
SELECT postroom_audit(quote_ident($1), $2);

-- name: unwatch
SELECT postroom_stop_audit(quote_ident($1));
