"""Which requests are accepted, in which order, and what each client has left of its limits."""
