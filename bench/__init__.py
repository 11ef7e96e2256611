"""Benchmarks: each module is a command that measures and prints a table. None is a test."""
