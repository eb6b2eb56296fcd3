"""The Bento model store: imports, quantises, lists and finds models. `python -m models.store` is its command line."""
