"""Blaze on Ray Serve: the only place where Ray lives."""
