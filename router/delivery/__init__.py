"""How an attempt reaches a service: in process or over HTTP. Decides nothing about retries or order."""
