"""Checkpoint folder -> stored model -> chat format and network."""
