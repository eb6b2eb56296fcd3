"""HTTP without endpoints: middleware, API keys, bodies, server-sent events, pages."""
