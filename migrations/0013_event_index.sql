-- Items of an event: they stand in the order of events, so that a summary of the pages is enough, which costs next to
-- nothing. Nobody writes to a partition while it is made for it, which is about a second for five million items.
CREATE INDEX whatsapp_messages_items_event_id ON whatsapp_messages_items
 USING brin (event_id) WITH (pages_per_range = 32, autosummarize = on);
