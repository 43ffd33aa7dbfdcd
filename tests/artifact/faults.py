"""Ways to break a write: its n-th step fails, the process ends there, the disk is full."""

import io
import os
import resource
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

FULL = OSError(28, "No space left on device")


class Steps:
    """What a writer does to the disk, in order; at step `number` the `deed` is done instead.

    Args:
        number: Which step, from 1; 0 lets all of them pass.
        deed: An exception to raise, or a function to call.
    """

    def __init__(self, number=0, deed=FULL):
        self.number, self.deed, self.names = number, deed, []

    def take(self, name, before=lambda: None):
        self.names.append(name)
        if len(self.names) == self.number:
            before()
            if isinstance(self.deed, BaseException):
                raise self.deed
            self.deed()


@contextmanager
def steps(number=0, deed=FULL):
    """Count the steps of all writers, and break one of them."""
    taken = Steps(number, deed)

    class File(io.BufferedWriter):
        def write(self, data):
            taken.take("write", lambda: self.half(memoryview(data)))
            return super().write(data)

        def half(self, data):
            super().write(data[: len(data) // 2])
            self.flush()

    def opened(path, mode="r", *arguments, **options):
        if mode != "xb":
            return plain["open"](path, mode, *arguments, **options)
        taken.take("open")
        return File(io.FileIO(path, "x"))

    def opened_folder(path, flags, *arguments, **options):
        if flags & os.O_DIRECTORY:
            taken.take("open folder")
        return plain_open(path, flags, *arguments, **options)

    def noted(name, function):
        def call(*arguments, **options):
            taken.take(name)
            return function(*arguments, **options)

        return call

    plain, plain_open = {name: getattr(Path, name) for name in ("open", "mkdir", "replace")}, os.open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", opened)
        patch.setattr(Path, "mkdir", noted("mkdir", plain["mkdir"]))
        patch.setattr(Path, "replace", noted("replace", plain["replace"]))
        patch.setattr(os, "open", opened_folder)
        patch.setattr(os, "fsync", noted("fsync", os.fsync))
        yield taken


def start(work):
    """Start a process that does `work` and return its number."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    finally:
        os._exit(70)


def in_a_process(work):
    """Return the exit code of a process that does `work`."""
    return os.waitstatus_to_exitcode(os.waitpid(start(work), 0)[1])


def kill(child, after):
    """Kill a process without warning."""
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@contextmanager
def full_disk(room):
    """Let no file grow beyond `room` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
