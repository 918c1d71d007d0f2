"""A terminal without a screen."""

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import threading
import time


class Terminal:
    """A pseudo-terminal that stands in for standard output within `with`; what was written to it."""

    def __init__(self, columns: int, rows: int):
        self._master, slave = pty.openpty()
        self.resize(columns, rows)
        self._file = open(slave, "w")  # noqa: SIM115
        self._parts: list[bytes] = []
        self._open = True
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> "Terminal":
        self._before, sys.stdout = sys.stdout, self._file
        return self

    def __exit__(self, *_exception: object) -> None:
        sys.stdout = self._before

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def text(self) -> str:
        """All that was written up to now, without colours and movements of the cursor."""
        self._file.flush()
        time.sleep(0.1)  # for the reader
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(self._parts).decode(errors="replace"))

    def hang_up(self) -> None:
        self._open = False
        self._reader.join()
        os.close(self._master)

    def _read(self) -> None:
        while self._open:  # or a writer would wait when the buffer is full
            if select.select([self._master], [], [], 0.05)[0]:
                self._parts.append(os.read(self._master, 65536))
