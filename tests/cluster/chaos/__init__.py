"""Hundreds of streams while servers move, fail and come back: ``make chaos``.

- ``site`` has the servers, and a proxy before each of them that clients and replicas pass.
- ``scenarios`` breaks them, one kind at a time. Its table says what a kind may lose.
- ``load`` writes, works and reads in one shell; it notes all that it was told.
- ``check`` holds what is stored, and what readers got, against what was said.
"""
