"""POST /messages: Anthropic's shape of a chat, over the same pipeline."""
