# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Mutual exclusion of processes that write a storage folder: the node, or mace_journal."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
import time

from mace_ros.store.journal_file import make_folder

_WAIT_SECONDS = 5.0     # for a process that is about to end


class StorageInUse(RuntimeError):
    """Another process uses the storage folder; the message says which one."""


class StorageLock:
    """
    A lock on ``folder`` against other processes, until :meth:`release` or the process's end.

    Raises :class:`StorageInUse`, or ``OSError`` if the folder can't be written.
    """

    def __init__(self, folder: Path, *, wait_s: float = _WAIT_SECONDS) -> None:
        """Take the lock within ``wait_s`` seconds, creating the folder if necessary."""
        make_folder(folder)
        # The file is never deleted: two processes could each lock a file of that name.
        self._file = os.open(folder / 'in_use', os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        end = time.monotonic() + wait_s
        while True:
            try:
                # lockf locks belong to the process: a node may configure itself again after a
                # failure that did not release the lock.
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() < end:
                    time.sleep(0.05)
                    continue
                holder = os.pread(self._file, 32, 0).decode(errors='replace').strip()
                self.release()
                raise StorageInUse(
                    f'{folder} is used by process {holder or "(unknown)"}, such as a running '
                    'node; stop it first, or use another folder') from None
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f'{os.getpid()}\n'.encode(), 0)

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
