"""Calls that release a lease."""

from ff_fast import WaitpointKind, WaitpointSpec


async def complete(backend, handle):
    await backend.complete(handle)


async def fail(backend, handle):
    await backend.fail(handle, "reason")


async def delay(backend, handle):
    await backend.delay(handle, 0)


async def wait_children(backend, handle):
    await backend.wait_children(handle)


async def suspend(backend, handle):
    point = await backend.create_waitpoint(handle)
    await backend.suspend(handle, WaitpointSpec(WaitpointKind.EXTERNAL, b"", point.hmac_token))
