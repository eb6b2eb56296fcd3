"""Job -> prompt token ids -> engine -> events of the answers."""
