"""Sentinels: which server is the primary of a service."""
