"""The commands of ``ff-fast``: each stands beside its arguments.

- ``demo``: demo.
- ``serve``: server.
- ``work``: worker; ``processes`` has those of one command, ``health`` what they serve over HTTP.
- ``read``: tail, summary, info, inspect.
- ``look``: ls, why, doctor, acl; ``top``: top.
- ``control``: submit, signal, cancel, supervise.
- ``shared``: arguments, exit codes and error messages that several of them use.
"""
