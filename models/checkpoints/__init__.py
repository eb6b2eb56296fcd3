"""Checkpoint folders as people have them -> folders that the networks load."""
