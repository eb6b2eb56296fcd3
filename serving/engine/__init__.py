"""Token ids in, token ids out. Knows nothing of text, chat or HTTP."""
