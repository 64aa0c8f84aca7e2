"""What another account of this machine (nobody's: uid 65534) gets, for tests that act as one."""

import os
import subprocess
import sys

from tests.conftest import skip_or_fail

UID = 65534
# Whatever a stranger imports, it imports first: the interpreter's own packages may be in a folder of ours alone.
_LEAVE = f"import os\nos.setgroups([])\nos.setgid({UID})\nos.setuid({UID})\n"


def as_another_account(code: str, *arguments: object, imports: str = "", timeout_s: float = 60.0) -> str:
    """What Python code prints that runs as nobody.  imports: run before, as ourselves.

    Skips where we are not root: only root can be somebody else.
    """
    if os.geteuid() != 0:
        skip_or_fail("only root can act as another account")
    done = subprocess.run(
        [sys.executable, "-c", f"{imports}\n{_LEAVE}{code}", *(str(argument) for argument in arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
