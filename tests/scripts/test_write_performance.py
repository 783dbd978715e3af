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
    for machine in write_performance.read():
        page = write_performance.page(machine)
        profiled = {result["case"] for result in machine.profiles["results"]}
        for result in condensed(machine.data["results"]):
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


def test_other_machines_follow_with_all_that_was_measured() -> None:
    machine = write_performance.read()[0]
    data = machine.data
    named = {**data, "machine": {**data["machine"], "processor": "Other", "simd": "wide"}}
    text = write_performance.page(machine, machine._replace(data=named))
    alone = write_performance.page(machine)
    assert text.startswith(alone)
    rest = text.removeprefix(alone)
    assert "Other, wide" in rest
    assert len(data["results"]) > 20
    for result in condensed(data["results"]):
        assert result["about"] in rest
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert len(headings) == len(set(headings))
    missed = [line for line in rest.splitlines() if line.startswith("#### ")]
    assert missed == [f"#{line}, wide" for line in alone.splitlines() if line.startswith("### `")]
