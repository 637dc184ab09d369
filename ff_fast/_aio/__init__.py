"""The parts of the asyncio shell, :mod:`ff_fast.aio`."""
