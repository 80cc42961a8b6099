"""The browser that opens the page in tests and benchmarks."""

import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
ABSENT = f"no browser found (looked for {', '.join(NAMES)}): apt-get install chromium"


def program() -> str | None:
    """The path of a Chromium; None where none is installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)
