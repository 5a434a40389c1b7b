"""Decoded fragments kept for the next reader."""
