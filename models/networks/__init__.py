"""Batches of token ids -> hidden states and logits. Each network is a `CausalLM` of `serving.engine.interface`."""
