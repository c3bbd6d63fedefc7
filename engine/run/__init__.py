"""The event loop of a run: its stages, queues, background jobs and views."""
