-- name: versions
-- The last fifty of each service, newest first: the newest that can be used counts.
SELECT service, version, state, definition::text AS definition, note, created_at, created_by
  FROM (SELECT *, row_number() OVER (PARTITION BY service ORDER BY version DESC) AS age FROM service_versions) v
 WHERE age <= 50
 ORDER BY service, version DESC;

-- name: secrets
SELECT service, secret, token_sha256 FROM service_secrets;

-- name: history
SELECT version, state, definition::text AS definition, note, created_at, created_by FROM service_versions
 WHERE service = $1 ORDER BY version DESC LIMIT $2;

-- name: add_version
SELECT postroom_add_service_version($1, $2, $3, $4, $5, $6, $7);

-- name: set_secret
SELECT postroom_set_service_secret($1, $2, $3, $4, $5);
