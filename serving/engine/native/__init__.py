"""The project's own engine: scheduler, KV cache, model runner, sampler."""
