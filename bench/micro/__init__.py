"""Micro-benchmarks of the extensions: no server, one function each.

Run them by ``python -m pytest bench/micro --benchmark-only``.
"""
