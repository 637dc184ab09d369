"""What ``ff_fast._hot.resp`` must do, written the slow and obvious way: the tests' oracle."""

import re


def pack_command(*parts: bytes) -> bytes:
    bulks = (b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
    return b"*%d\r\n" % len(parts) + b"".join(bulks)


def pack_fcall(
    function: bytes, keys: tuple[bytes, ...], argv: tuple[bytes, ...], read_only: bool = False
) -> bytes:
    command = b"FCALL_RO" if read_only else b"FCALL"
    return pack_command(command, function, b"%d" % len(keys), *keys, *argv)


MAX_OWED = 1 << 20
MAX_BULK = 64 << 20
MAX_LINE = 1 << 16
MAX_REPLY = 256 << 20
VALUE_BYTES = 64


class ReplyGuard:
    """Reads the whole stream again with every call."""

    def __init__(self) -> None:
        self._stream = b""

    def accepts(self, data: bytes) -> bool:
        self._stream += data
        return sizes_fit(self._stream)


def sizes_fit(stream: bytes) -> bool:
    """Whether a prefix of a stream of replies announces no more than an answer may have."""
    at = owed = taken = 0
    while at < len(stream):
        if owed == 0:
            owed, taken = 1, 0
        taken += VALUE_BYTES
        if taken > MAX_REPLY:
            return False
        kind = stream[at : at + 1]
        at += 1
        if kind in (b"$", b"=", b"*", b"%", b"~", b">"):
            length = re.compile(rb"(-?[0-9]{1,9})\r\n").match(stream, at)
            if length is None:
                return re.fullmatch(rb"-?([0-9]{0,9}|[0-9]{1,9}\r)", stream[at:]) is not None
            at = length.end()
            count = int(length[1])
            if length[1].startswith(b"-"):
                owed -= 1
            elif kind in (b"$", b"="):
                if count > MAX_BULK:
                    return False
                if len(stream) < at + count + 2:
                    return True
                at += count + 2
                taken += count
                owed -= 1
            else:
                owed += count * (2 if kind == b"%" else 1) - 1
                if owed > MAX_OWED:
                    return False
        elif kind in (b"+", b"-", b":", b"_", b"#", b",", b"("):
            end = stream.find(b"\r\n", at)
            if (end + 1 if end >= 0 else len(stream)) - at > MAX_LINE:
                return False
            if end < 0:
                return True
            taken += end + 2 - at
            at = end + 2
            owed -= 1
        else:
            return False
    return True
