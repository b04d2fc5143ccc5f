"""What senders post, turned into items. Pure: no I/O, no clock; durability and routing are elsewhere."""
