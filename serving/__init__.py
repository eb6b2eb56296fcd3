"""The server: it knows chat, tokens and HTTP; it knows no model."""
