"""Engines: what turns a request into events. Every kind keeps the same protocol (``base.py``)."""
