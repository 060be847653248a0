"""The demo's parts that need no trained weights."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from edit_compile.measuring.plot import latency_bars, save
from edit_compile.measuring.timing import Spread
from examples.fashion_mnist.demo_measure import judge_images, waits_told
from examples.fashion_mnist.demo_reference import PATH, load_reference
from examples.fashion_mnist.demo_report import cells, tier_cells, write_report
from examples.fashion_mnist.demo_tiers import RESULTS, rivals_of
from examples.fashion_mnist.judge import Judge, frechet_distance, frechet_of_gaussians, gaussian


def results() -> dict:
    spread = {"median": 2.0, "low": 1.5, "high": 2.5, "count": 3}
    row = {
        "name": "a",
        "ms": spread,
        "ratio": spread,
        "flops_left": 0.4,
        "accuracy": 0.9,
        "distance": 8.0,
        "grid": "a.png",
    }
    return {
        "engine": "torch",
        "images": 200,
        "steps": 28,
        "repeats": 3,
        "largest_difference": 3e-6,
        "real": {"accuracy": 0.92, "distance": None},
        "rows": [row, row | {"name": "<b>"}],
        "tiers": [
            {"name": "dense, 28 steps", "beside": "", "ratio": spread, "decibels": None, "grid": "a.png"},
            {"name": "tier: half", "beside": "half", "ratio": spread, "decibels": 48.8, "grid": "a.png"},
            {"name": "fewer steps: 14 steps", "beside": "half", "ratio": spread, "decibels": 35.9, "grid": "a.png"},
        ],
        "waits": "",
        "machine": {"cpu": "a processor", "cores": "2", "torch": "2.13.0"},
    }


def test_frechet_distance_of_shifted_and_scaled_gaussians() -> None:
    features = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(features, features + 3) == pytest.approx(8 * 9)
    mean, covariance = gaussian(features)
    scaled = frechet_of_gaussians((mean, covariance), (mean, 4 * covariance))
    assert scaled == pytest.approx(covariance.trace())


def test_a_feature_that_never_fires_gives_a_finite_distance() -> None:
    features = torch.randn(50, 8)
    features[:, 3] = 0
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-4)


@pytest.mark.skipif(not PATH.is_file(), reason="made with the judge's weights")
def test_real_images_come_closer_the_more_there_are() -> None:
    reference = load_reference()
    floors = [value for _, value in sorted(reference.floors.items())]
    assert floors == sorted(floors, reverse=True)
    assert 0.9 < reference.accuracy < 1
    noise, _ = judge_images(torch.randn(20, 28, 28), Judge().eval(), reference)
    assert 0 <= noise <= 1


def test_the_table_ends_with_what_real_images_reach() -> None:
    rows = cells(results())
    assert rows[0] == ("a", "2.0", "2.00 (1.50 to 2.50)", "40%", "90.0%", "8.00")
    assert rows[-1] == ("real images", "", "", "", "92.0%", "")


def test_the_report_holds_its_pictures_and_escapes_text(tmp_path: Path) -> None:
    for name in ("a.png", "latency.png", "router.png"):
        save(latency_bars({"a": Spread(1, 1, 1, 1)}), tmp_path / name)
    page = write_report(results(), tmp_path).read_text()
    assert page.count("data:image/png;base64,iVBOR") == 7
    assert "waited" not in page
    assert "&lt;b&gt;" in page
    assert 'src="http' not in page


def test_the_report_repeats_that_the_machine_was_loaded(tmp_path: Path) -> None:
    save(latency_bars({"a": Spread(1, 1, 1, 1)}), tmp_path / "a.png")
    for name in ("latency.png", "router.png"):
        (tmp_path / name).write_bytes((tmp_path / "a.png").read_bytes())
    told = waits_told([warned("threads waited for a core for 40% of the time"), warned("another")])
    assert (
        "Of the times on this page: threads waited" in write_report(results() | {"waits": told}, tmp_path).read_text()
    )
    assert waits_told([]) == ""


def warned(text: str) -> warnings.WarningMessage:
    return warnings.WarningMessage(UserWarning(text), UserWarning, "here.py", 1)


def test_rivals_stand_beside_their_tier() -> None:
    assert tier_cells(results()) == [
        ("dense, 28 steps", "2.00", "-"),
        ("tier: half", "2.00", "48.8"),
        ("beside it: fewer steps: 14 steps", "2.00", "35.9"),
    ]


def test_what_takes_no_longer_than_a_tier_is_as_recorded() -> None:
    recorded = {
        f"{one['who']}: {one['settings']}": one for one in json.loads((RESULTS / "rivals.json").read_text())["results"]
    }
    for rival in rivals_of("quarter"):
        known = recorded[rival.name.replace("fewer steps", "fewer steps, compiled")]
        assert known["times_faster"] >= recorded["tier: quarter"]["times_faster"]
