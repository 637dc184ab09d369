"""Streams behind the interfaces of other projects. Each module needs the package that it adapts, and is imported by name.

:mod:`ff_fast.adapters.assistant_ui`
    The store of assistant-ui's resumable streams (extra ``assistant-ui``).
:mod:`ff_fast.adapters.a2a`
    The task store and the event stream of A2A's Python SDK (extra ``a2a``).
"""
