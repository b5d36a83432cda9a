"""The benchmark runs; what it measures is not asserted here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent / "bench"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmark needs Linux")


@pytest.mark.long
@pytest.mark.timeout(120)
def test_every_scenario_gives_figures(tmp_path: Path) -> None:
    """Every scenario, made small, gives a row with figures for our server."""
    report = tmp_path / "figures.json"
    small = ["--scale", "0.02", "--seconds", "0.2", "--server", "ours", "--json", str(report)]
    done = subprocess.run(
        [sys.executable, str(BENCH), *small], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(report.read_text())["rows"]
    without_figures = {row["scenario"]: row["failed"] for row in rows if not row["figures"]}
    assert not {k: why for k, why in without_figures.items() if "no openssl" not in why}
    assert all(name in done.stdout for name in ("quiet", "stadium", "flood-durable", "storm"))
