"""A Chromium without any traffic of its own, for pages that this machine serves."""

import contextlib
import shutil

from tests.conftest import skip_or_fail

# Chromium's own traffic is off, and a name that is not this machine's finds nothing.
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip


@contextlib.contextmanager
def open_chromium(*flags):
    """flags: more of Chromium's own."""
    from playwright.sync_api import sync_playwright

    binary = shutil.which("chromium")
    if binary is None:
        skip_or_fail("chromium is not installed (Debian's package chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=[*FLAGS, *flags])
        yield browser
        browser.close()
