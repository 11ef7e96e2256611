"""Queries and state changes as plain functions over a session; nothing here commits."""
