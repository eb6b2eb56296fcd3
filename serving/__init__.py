"""The server: HTTP requests -> prompts -> token ids -> answers. Model families are given to it from outside."""
