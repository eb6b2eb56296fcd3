"""Everything about vLLM: the engine over its AsyncLLM, its processes' logits processors, its start."""
