"""The server: HTTP requests -> prompts -> token ids -> answers. Model families are given to it from outside."""

__version__ = "0.2.0"
