"""Shared state: the only place that talks to Redis."""
