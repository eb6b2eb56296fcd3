"""Token ids -> sampled tokens, for many requests at once: the interface and its two implementations."""
