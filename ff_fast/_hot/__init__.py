"""Compiled hot paths: bytes and numbers in, bytes and numbers out; no socket, no clock of their own.

Each module is one ``.pyx`` with a ``.pxd`` for the others to cimport and a ``.pyi`` for type
checkers.  There is no pure-Python fallback: an extension that is missing is an error.
"""
