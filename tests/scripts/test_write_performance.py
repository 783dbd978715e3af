"""scripts/write_performance.py: docs/performance.md is what the measured times say; drift is seen,
and a missed goal is never passed over."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import write_performance
from scripts.benchmark_report import GOAL_THREADS, condensed, reached


def test_the_page_is_up_to_date() -> None:
    assert write_performance.main(["--check"]) == 0


def test_every_missed_goal_has_its_reason_and_profile() -> None:
    data, profiles, _ = write_performance.read()
    page = write_performance.page(data, profiles)
    profiled = {result["case"] for result in profiles["results"]}
    for result in condensed(data["results"]):
        if result["threads"] != GOAL_THREADS:
            continue
        missed = any(not fine for _, fine in reached(result).values())
        assert (f"### `{result['case']}`" in page) == missed
        if missed:
            assert result["case"] in profiled
            assert result["case"] in write_performance.REASONS


def test_drift_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    monkeypatch.setattr(write_performance, "PAGE", page)
    assert write_performance.main(["--check"]) == 1
    assert write_performance.main([]) == 0
    assert page.read_text() == write_performance.page(*write_performance.read())
    page.write_text(page.read_text().replace("us", "ms", 1))
    assert write_performance.main(["--check"]) == 1


def test_other_machines_follow_with_all_their_times() -> None:
    data, profiles, _ = write_performance.read()
    other = {**data, "machine": {**data["machine"], "processor": "Other", "simd": "avx2"}}
    text = write_performance.page(data, profiles, [other])
    alone = write_performance.page(data, profiles)
    assert text.startswith(alone)
    rest = text.removeprefix(alone)
    assert "Other, avx2" in rest
    assert len(data["results"]) > 20
    for result in condensed(data["results"]):
        assert result["about"] in rest
