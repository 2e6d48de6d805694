"""A wall clock that tests can make jump, for processes that load it before libc.

Owns a small shared library and the file it shares with the processes; needs a C compiler.
"""

from __future__ import annotations

import mmap
import shutil
import struct
import subprocess
from pathlib import Path

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
static struct { volatile long offset_s, num_reads; } *shared;
__attribute__((constructor)) static void attach(void) {
    const char *path = getenv("KVMESH_TEST_CLOCK");
    int file = path ? open(path, O_RDWR) : -1;
    if (file < 0) return;
    void *page = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (page != MAP_FAILED) shared = page;
}
static long offset(void) {
    if (!shared || !shared->offset_s) return 0;
    __sync_fetch_and_add(&shared->num_reads, 1);
    return shared->offset_s;
}
int clock_gettime(clockid_t clock, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failure = real(clock, at);
    if (!failure && clock == CLOCK_REALTIME) at->tv_sec += offset();
    return failure;
}
int gettimeofday(struct timeval *at, void *zone) {
    static int (*real)(struct timeval *, void *);
    if (!real) real = dlsym(RTLD_NEXT, "gettimeofday");
    int failure = real(at, zone);
    if (!failure) at->tv_sec += offset();
    return failure;
}
time_t time(time_t *at) {
    static time_t (*real)(time_t *);
    if (!real) real = dlsym(RTLD_NEXT, "time");
    time_t now = real(0) + offset();
    if (at) *at = now;
    return now;
}
"""


class Clock:
    """Build in a directory; start processes with `env`; then `jump`."""

    def __init__(self, directory: Path) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc")
        assert compiler, "no C compiler; the README asks for gcc"
        source, library = directory / "clock.c", directory / "clock.so"
        source.write_text(SOURCE)
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
        page = directory / "clock.page"
        page.write_bytes(bytes(4096))
        with page.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), 4096)
        self.env = {"LD_PRELOAD": str(library), "KVMESH_TEST_CLOCK": str(page)}

    @property
    def num_reads(self) -> int:
        """How often processes read a clock that had jumped."""
        return struct.unpack_from("<q", self._page, 8)[0]

    def jump(self, offset_s: int) -> None:
        """Sets every process's wall clock to this far from the true one."""
        struct.pack_into("<q", self._page, 0, offset_s)
