"""What ``ff_fast._hot.resp`` must do, written the slow and obvious way: the tests' oracle."""


def pack_command(*parts: bytes) -> bytes:
    bulks = (b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
    return b"*%d\r\n" % len(parts) + b"".join(bulks)


def pack_fcall(
    function: bytes, keys: tuple[bytes, ...], argv: tuple[bytes, ...], read_only: bool = False
) -> bytes:
    command = b"FCALL_RO" if read_only else b"FCALL"
    return pack_command(command, function, b"%d" % len(keys), *keys, *argv)
