"""The references of `bench ack`: the durable webhook as a good engineer would write it on each framework."""
