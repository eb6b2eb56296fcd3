"""The Bento model store: import, quantise, list and find models. `python -m models.store` is its command line."""
