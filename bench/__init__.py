"""Benchmarks: every claim about speed, measured beside what users would pick (see README.md)."""
