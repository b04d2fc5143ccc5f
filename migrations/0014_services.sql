-- Services: what operators said of them while routers ran. Each change is a version that is only added; the newest one
-- counts, over what the configuration file says. Secrets are apart, where a dashboard does not see them.

CREATE TABLE service_versions (
    service    text NOT NULL CHECK (service ~ '^[a-z][a-z0-9_]{0,62}$'),
    version    integer NOT NULL CHECK (version > 0),
    state      text NOT NULL CHECK (state IN ('active', 'paused', 'draining', 'removed')),
    definition jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(definition) = 'object'),
    note       text,
    created_at timestamptz NOT NULL,
    created_by text NOT NULL,
    PRIMARY KEY (service, version)
);
COMMENT ON TABLE service_versions IS
    'definition: settings as in [services.NAME] of postroom.toml; what it does not name is as the file has it';
CREATE TRIGGER service_versions_is_only_added_to BEFORE UPDATE OR DELETE OR TRUNCATE ON service_versions
    FOR EACH STATEMENT EXECUTE FUNCTION postroom_refuse_change();
ALTER TABLE service_versions ENABLE ALWAYS TRIGGER service_versions_is_only_added_to;

CREATE TABLE service_secrets (
    service      text PRIMARY KEY,
    secret       text CHECK (secret LIKE 'whsec\_%'),
    token_sha256 text CHECK (token_sha256 ~ '^[0-9a-f]{64}$'),
    updated_at   timestamptz NOT NULL,
    updated_by   text NOT NULL
);
COMMENT ON TABLE service_secrets IS
    'secret: whsec_, signs what is posted to the service; token_sha256: of the token that the service shows to us';

SELECT postroom_protect('service_versions', 'r', 'ra',  'r');
SELECT postroom_protect('service_secrets',  'r', 'raw', '');

-- Whoever runs a router hears of it at once.
CREATE FUNCTION postroom_services_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NOTIFY postroom_services;
    RETURN NULL;
END $$;
CREATE TRIGGER postroom_services_changed AFTER INSERT ON service_versions
    FOR EACH STATEMENT EXECUTE FUNCTION postroom_services_changed();
CREATE TRIGGER postroom_services_changed AFTER INSERT OR UPDATE OR DELETE ON service_secrets
    FOR EACH STATEMENT EXECUTE FUNCTION postroom_services_changed();

-- The version after p_expected, which was the newest that somebody had seen; null: it is not the newest any more.
CREATE FUNCTION postroom_add_service_version(
    p_now timestamptz, p_actor text, p_service text, p_expected integer, p_state text, p_definition text, p_note text
) RETURNS integer LANGUAGE plpgsql AS $$
BEGIN
    IF p_expected IS DISTINCT FROM
       coalesce((SELECT max(version) FROM service_versions WHERE service = p_service), 0) THEN
        RETURN NULL;
    END IF;
    INSERT INTO service_versions (service, version, state, definition, note, created_at, created_by)
    VALUES (p_service, p_expected + 1, p_state, p_definition::jsonb, p_note, p_now, p_actor)
        ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    INSERT INTO audit_log (acted_at, actor, action, object_type, object_id, detail)
    VALUES (p_now, p_actor, 'service.change', 'service_versions', p_service,
            jsonb_build_object('version', p_expected + 1, 'state', p_state));
    RETURN p_expected + 1;
END $$;

CREATE FUNCTION postroom_set_service_secret(
    p_now timestamptz, p_actor text, p_service text, p_secret text, p_token_sha256 text
) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO service_secrets AS s (service, secret, token_sha256, updated_at, updated_by)
    VALUES (p_service, p_secret, p_token_sha256, p_now, p_actor)
        ON CONFLICT (service) DO UPDATE
       SET secret = coalesce(p_secret, s.secret), token_sha256 = coalesce(p_token_sha256, s.token_sha256),
           updated_at = p_now, updated_by = p_actor;
    INSERT INTO audit_log (acted_at, actor, action, object_type, object_id, detail)
    VALUES (p_now, p_actor, 'service.secret', 'service_secrets', p_service,
            jsonb_build_object('changed', CASE WHEN p_secret IS NULL THEN 'token' ELSE 'secret' END));
END $$;
