"""Where models come from, and the copies of them that are kept on disk."""
