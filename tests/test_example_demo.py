"""The demo's parts that need no trained weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edit_compile.measuring.plot import latency_bars, save
from edit_compile.measuring.timing import Spread
from examples.fashion_mnist.demo_measure import judge_images
from examples.fashion_mnist.demo_reference import PATH, load_reference
from examples.fashion_mnist.demo_report import cells, write_report
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
    assert page.count("data:image/png;base64,iVBOR") == 4
    assert "&lt;b&gt;" in page
    assert 'src="http' not in page
