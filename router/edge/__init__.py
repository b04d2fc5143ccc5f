"""How requests come in and answers go out. No policy: what a request means is decided in router.accept."""
