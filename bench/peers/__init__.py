"""Reference servers that `bench ack` compares with: the same durable webhook as a good engineer would write it on each framework."""
