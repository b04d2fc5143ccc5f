"""What can be seen of a running router: logs, and the masking that they go through. Decides nothing."""
