"""A pseudo-terminal to write on, and what a person then sees."""

import fcntl
import os
import pty
import re
import struct
import termios
import time


class Terminal:
    """A pseudo-terminal of 100 columns, read when it is closed."""

    def __enter__(self):
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        self.stream = os.fdopen(slave, "w")
        return self

    def __exit__(self, *_):
        self.stream.close()
        os.close(self._master)

    def text(self) -> str:
        """What was written so far, without the codes that move the cursor and colour."""
        self.stream.flush()
        os.set_blocking(self._master, False)
        parts = []
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            try:
                parts.append(os.read(self._master, 65536))
            except BlockingIOError:
                time.sleep(0.02)
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(parts).decode())
