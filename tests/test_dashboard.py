"""The dashboard in a real browser: a person fills in the form, watches the run and reads what came of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, which the extra dev installs")
import httpx  # noqa: E402
import polars as pl  # noqa: E402
from conftest import clustered_vectors  # noqa: E402
from dashboard import CHROMIUM, PATIENCE_MS, VERSIONS, Dashboard, started_browser, started_dashboard  # noqa: E402
from servers import make_server  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("dashboard"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium; on Debian: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which runs work, with a catalogue whose vectors need no embedding."""
    folder = tmp_path_factory.mktemp("dashboard")
    vectors = clustered_vectors(2000, 32)
    columns = {name: [f"{name} {row % 40}" for row in range(len(vectors))] for name in ("brand", "category")}
    split = ["test" if row % 10 == 0 else "train" for row in range(len(vectors))]
    frame = pl.DataFrame({"item_id": range(len(vectors)), "split": split, "vector": vectors, **columns})
    for version in VERSIONS:
        frame.write_parquet(folder / f"items-{version}.parquet")
    return folder


@pytest.fixture(scope="module")
def address(place: Path, prefect_database: Path) -> Iterator[str]:
    with started_dashboard(place, database=prefect_database) as address:
        yield address


@pytest.mark.parametrize("version", VERSIONS)
def test_a_sweep_is_started_from_the_form_watched_and_read(address: str, place: Path, version: str) -> None:
    with started_browser() as browser:
        dashboard = Dashboard(browser, address, version)
        dashboard.open_form("quick-look")
        shape = {"v1": "7x9x8", "v2": "9x7x8"}[version]
        dashboard.field("Shapes", 1).fill(shape)
        dashboard.field("Files").fill(f"items-{version}.parquet")
        dashboard.field("Template").fill("")
        dashboard.field("Vector column").fill("vector")
        dashboard.field("Run folder").fill(f"runs/{version}")
        run = dashboard.submit_run()
        assert dashboard.wait_until_done(run, seconds=300) == "Completed", dashboard.logs(run)
        assert f"sweep · items-{version} · 3 shapes × 3 mappings" in dashboard.text()
        dashboard.open_artifacts()
        dashboard.open_artifact(f"comparison-items-{version}")
        dashboard.page.get_by_role("heading", name="Reports").wait_for()
        folder = place / "runs" / version / "results" / f"items-{version}"
        rows = {row["cell"]: row for row in json.loads((folder / "comparison.json").read_text())}
        assert len(rows) == 9
        page = dashboard.page.locator("body")
        for name, row in rows.items():
            # The page may show its parts one after the other.
            playwright.expect(page).to_contain_text(name, timeout=PATIENCE_MS)
            playwright.expect(page).to_contain_text(f"{row['collision_rate']:.4f}", timeout=PATIENCE_MS)
        assert_pictures(dashboard, 1)
        cell = f"{shape}-capacity-residual-kmeans"
        dashboard.follow(cell)
        dashboard.page.get_by_role("heading", name="Levels").wait_for()
        assert f"the collision rate is {rows[cell]['collision_rate']:.4f}" in dashboard.text()
        assert_pictures(dashboard, 3)


def assert_pictures(dashboard: Dashboard, count: int) -> None:
    """Every picture on the page is there and was drawn."""
    pictures = dashboard.page.locator('img[src^="data:image/png"]')
    playwright.expect(pictures).to_have_count(count)
    for picture in pictures.all():
        assert picture.evaluate("async picture => { await picture.decode(); return picture.naturalWidth; }") > 300


@pytest.mark.parametrize("version", VERSIONS)
def test_wrong_input_is_refused_by_name_before_a_run_exists(address: str, version: str) -> None:
    with started_browser() as browser:
        dashboard = Dashboard(browser, address, version)
        dashboard.open_form("quick-look")
        dashboard.field("Shapes", 2).fill("256 by 256")
        created: list[bool] = []
        dashboard.page.on(
            "response", lambda answer: created.append(answer.ok) if answer.url.endswith("create_flow_run") else None
        )
        dashboard.submit()
        dashboard.page.get_by_text("does not match").first.wait_for()
        assert not any(created)
        assert re.search(r"shapes|Shapes", dashboard.text())


def test_a_server_with_an_auth_string_shows_its_deployments_to_those_who_give_it(
    tmp_path: Path, prefect_database: Path
) -> None:
    secret = "semids:let me in"
    named = {"PREFECT_SERVER_API_AUTH_STRING": secret, "PREFECT_API_AUTH_STRING": secret}
    server = make_server(tmp_path, database=prefect_database, **named)
    with server.running(), started_browser() as browser:
        apply = [sys.executable, "-m", "deployments.apply"]
        subprocess.run(apply, env=server.environment, cwd=tmp_path, check=True)
        assert httpx.post(f"{server.address}/api/deployments/count", json={}).status_code == 401
        for version in VERSIONS:
            dashboard = Dashboard(browser, server.address, version)
            dashboard.log_in("semids:of another server")
            dashboard.page.get_by_text(re.compile("Authentication failed|Invalid credentials")).first.wait_for()
            dashboard.page.wait_for_load_state("networkidle")
            assert "quick-look" not in dashboard.text()
            dashboard.log_in(secret)
            dashboard.page.get_by_text("quick-look").first.wait_for()
