"""Pages in a headless Chromium without a network, for tests that open what people would."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Playwright

ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


def start(playwright: Playwright) -> Browser:
    """The system's Chromium or Playwright's own; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    own = playwright.chromium.executable_path
    if found is None and not Path(own).exists():
        pytest.skip("no Chromium: apt-get install chromium, or python -m playwright install chromium")
    return playwright.chromium.launch(executable_path=found or own, args=list(ARGUMENTS))


@contextmanager
def opened(browser: Browser, file: Path, **context: object) -> Iterator[tuple[Page, list[str]]]:
    """A page that has drawn its charts, and what was told on its console or asked of the network: a growing list."""
    with browser.new_context(offline=True, **context) as place:
        page = place.new_page()
        told: list[str] = []
        page.on("console", lambda message: told.append(f"console {message.type}: {message.text}"))
        page.on("pageerror", lambda error: told.append(f"error: {error}"))
        page.on("request", lambda request: told.append(f"request: {request.url}"))
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready]", timeout=60_000)
        told.remove(f"request: {file.as_uri()}")
        yield page, told
