"""Runs that are killed, and whether they go on as if nothing had been: `python -m tests.kills --help`."""
