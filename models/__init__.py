"""Checkpoint folder -> stored model -> prompt format and network. Nothing here knows HTTP."""
