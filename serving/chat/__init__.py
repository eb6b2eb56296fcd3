"""Words and tokens: the only package that knows both. Knows nothing of HTTP."""
