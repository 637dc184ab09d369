"""An hour of everything at once, with a seed: ``make soak``.

- ``plan`` draws the faults and their moments from the seed.
- ``site`` has the processes: a durable server, proxies before it, workers and supervisors of both shells.
- ``faults`` injects one fault and heals it. Its table is the list of kinds.
- ``job`` is what an execution has to do, and every byte that it must leave behind.
- ``child`` is the program of the workers and supervisors.
- ``load`` creates executions, signals, cancels, reads, subscribes, and calls with limits that faults exceed.
- ``failover`` is the one fault with servers of its own.
- ``account`` keeps what was said: every call with its outcome, every acknowledged frame, every completion.
- ``check`` holds what is stored against the account.
"""
