"""Structured outputs: JSON schemas, patterns, choices and tool calls as grammars and token masks."""
