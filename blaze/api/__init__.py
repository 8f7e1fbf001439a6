"""HTTP to ``blaze.types`` and back: OpenAI's API over whatever serves the requests."""
