"""A real browser, headless, without a network."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")


def found() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def launched() -> Iterator[Any]:
    """Debian's chromium, or another of its kind. Skips where there is none."""
    path = found()
    if path is None:
        pytest.skip(f"no browser to be had: none of {', '.join(NAMES)} is installed (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    # A sandbox of its own is not to be had as root, nor in most containers.
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=options)
        yield browser
        browser.close()


class Watched:
    """A page opened from disk, with all that it asked for, said and was interrupted by."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1400, "height": 900}, offline=True, **options)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.faults: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.faults.append(message.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.faults.append(dialog.message), dialog.dismiss()))
        self.page.goto(file.as_uri())

    def assert_quiet(self) -> None:
        """It asked for nothing but itself, and neither failed nor was stopped by its own policy."""
        assert [url for url in self.requests if not url.startswith("file:")] == [] and len(self.requests) == 1
        assert self.faults == []
