-- name: unsent
SELECT count(*) FROM whatsapp_outbox WHERE status = 'pending';

-- name: stored
SELECT message_id FROM whatsapp_messages WHERE direction = 'inbound' AND message_id IS NOT NULL;

-- name: dead_letters
SELECT message_id FROM webhook_dlq WHERE message_id IS NOT NULL;
