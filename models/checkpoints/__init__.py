"""Checkpoint folders as they are published -> folders that the networks load, and those folders -> networks."""
