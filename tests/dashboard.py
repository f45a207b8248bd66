"""A person at the dashboard: fill in the form, watch the run, read its pages. In both versions that the server has."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from playwright.sync_api import Browser, Locator, Page, sync_playwright
from servers import give_database

from tasks.server import free_port

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
VERSIONS = ("v1", "v2")
PATIENCE_MS = 120_000


@contextmanager
def started_dashboard(folder: Path, *, database: Path | None = None) -> Iterator[str]:
    """Start what `make up` starts, with `folder` as the place where runs work; yield the server's address.

    Args:
        database: see `servers.make_server`.
    """
    if database:
        give_database(folder / "prefect", database)
    address = f"http://127.0.0.1:{(port := free_port())}"
    named = {"PREFECT_HOME": str(folder / "prefect"), "PREFECT_SERVER_API_PORT": str(port)}
    quiet = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PREFECT_LOGGING_EXTRA_LOGGERS": "semids"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    with (folder / "up.log").open("wb") as log:
        up = subprocess.Popen(
            [sys.executable, "-m", "deployments.up"],
            cwd=folder,
            env={**environment, **named, **quiet},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert up.stdout is not None
        try:
            for line in up.stdout:
                if line.startswith("Dashboard:"):
                    break
            else:
                raise RuntimeError((folder / "up.log").read_text())
            yield address
        finally:
            up.send_signal(signal.SIGTERM)
            up.wait(timeout=90)


@contextmanager
def started_browser() -> Iterator[Browser]:
    """Start Chromium without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield browser
        browser.close()


def find_deployment(address: str, name: str) -> str:
    """Return the id of a deployment."""
    found = httpx.post(f"{address}/api/deployments/filter", json={}).json()
    return next(deployment["id"] for deployment in found if deployment["name"] == name)


class Dashboard:
    """One version of the dashboard in one browser page."""

    def __init__(self, browser: Browser, address: str, version: str) -> None:
        self.page: Page = browser.new_page(viewport={"width": 1400, "height": 1000})
        self.page.set_default_timeout(PATIENCE_MS)
        self.address = address
        self.version = version
        self._pages = f"{address}/v2" if version == "v2" else address

    def open_form(self, deployment: str) -> None:
        """Open the form that starts a run."""
        place = find_deployment(self.address, deployment)
        self.page.goto(f"{self._pages}/deployments/deployment/{place}/run")
        self.field("Run folder").wait_for()

    def log_in(self, secret: str) -> None:
        """Ask for the list of deployments, and give what the page asks for first."""
        self.page.goto(f"{self._pages}/deployments")
        box = self.page.locator("input[type=password]")
        box.fill(secret)
        box.press("Enter")

    def field(self, label: str, place: int = 1) -> Locator:
        """Return the box under a label, or of a list of boxes the one at `place`, from 1."""
        return self.page.locator(f'xpath=(//label[contains(., "{label}")]/following::textarea)[{place}]')

    def submit(self) -> None:
        """Press the button at the end of the form."""
        self.page.get_by_role("button", name="Submit").click()

    def submit_run(self) -> str:
        """Press the button at the end of the form, and return the id of the run that the server has created."""
        with self.page.expect_response(lambda answer: answer.url.endswith("create_flow_run") and answer.ok) as answer:
            self.submit()
        return str(answer.value.json()["id"])

    def open_run(self, run: str) -> None:
        """Open a run's page."""
        self.page.goto(f"{self._pages}/runs/flow-run/{run}")

    def wait_until_done(self, run: str, *, seconds: float) -> str:
        """Watch a run's page until its badge says how it ended, and return that."""
        self.open_run(run)
        ends = ("Completed", "CompletedWithFailures", "Failed", "Crashed", "Cancelled")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for end in ends:
                if self.page.get_by_text(end, exact=True).first.is_visible():
                    return end
            self.page.wait_for_timeout(500)
        raise TimeoutError(f"the run did not end within {seconds} s: {self.page.inner_text('body')[:2000]}")

    def logs(self, run: str) -> str:
        """Return what the server has of a run's log."""
        query = {"logs": {"flow_run_id": {"any_": [run]}}, "limit": 200}
        return "\n".join(line["message"] for line in httpx.post(f"{self.address}/api/logs/filter", json=query).json())

    def open_artifacts(self) -> None:
        """Open the list of artifacts on a run's page."""
        self.page.get_by_role("tab", name="Artifacts").or_(self.page.get_by_text("Artifacts", exact=True)).first.click()

    def open_artifact(self, key: str) -> None:
        """Open the artifact of the given key from a run's list of them; version v2 shows the key's history between."""
        self.page.get_by_text(key, exact=True).first.click()
        if self.version == "v2":
            self.page.locator('a[href*="/artifacts/artifact/"]').first.click()

    def follow(self, name: str) -> None:
        """Follow the link of the given text; the first version opens such links in a new page."""
        link = self.page.get_by_role("link", name=name, exact=True)
        if link.get_attribute("target") != "_blank":
            link.click()
            return
        with self.page.expect_popup() as opened:
            link.click()
        self.page = opened.value
        self.page.set_default_timeout(PATIENCE_MS)

    def text(self) -> str:
        """Return all that the page shows."""
        return self.page.locator("body").inner_text()
