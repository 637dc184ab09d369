"""``ff-fast demo``: a worker streams a text in all three modes, and a reader in another process checks it.

- ``plan``: the frames that the worker writes, computed from rate, number of tokens and modes.
- ``check``: the frames that the reader must get, and the comparison.
- ``view``: figures while it runs, and the outcome.
- ``run``: what the three processes do.
- ``processes``: how they are started, spoken to and ended.
- ``chat``, ``answers``: ``ff-fast demo --web``, a chat in a browser; its site, and its worker.
"""
