"""Which replica serves a request: pure decisions, and one dispatcher that acts on them."""
