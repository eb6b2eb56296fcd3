"""Batches of token ids -> hidden states and logits."""
