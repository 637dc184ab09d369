"""A primary that dies before its replica has everything, and a server that comes back older or empty."""

from .stored import claimed


async def test_the_pair(pair, shell, lane):
    async with await shell.connect(pair.url) as backend:
        eid, handle = await claimed(backend, lane)
        pair.stall()
        await backend.progress(handle, 50)
        pair.promote()
        print(await backend.describe(eid))
