"""Rows: keys, endpoints, registered models and their events, on SQLite or PostgreSQL."""
