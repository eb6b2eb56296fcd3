"""The life of one worker process: start, readiness, health, metrics route, graceful shutdown."""
