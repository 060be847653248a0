"""The Fashion-MNIST example: its data, task, sampler and measures, without training anything."""

from __future__ import annotations

import gzip
import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edit_compile import order_channels
from examples.fashion_mnist import data, evaluate, judge, task, width_curve
from examples.fashion_mnist.model import WEIGHTS, dense_model, image_ids, inputs, load_model
from examples.fashion_mnist.sample import FEW_STEPS, sample, save_grid

needs_data = pytest.mark.skipif(not data.FOLDER.is_dir(), reason=f"needs the package {data.PACKAGE}")
needs_weights = pytest.mark.skipif(not (WEIGHTS / "elastic").is_dir(), reason="needs the trained weights")


def write_split(folder: Path, count: int = 3) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    labels = np.arange(count, dtype=np.uint8)
    header = np.array([0x803, count, 28, 28], ">i4").tobytes()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
    header = np.array([0x801, count], ">i4").tobytes()
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))
    return images, labels


def test_idx_files_are_read(tmp_path):
    images, labels = write_split(tmp_path)
    loaded, named = data.load_split("train", tmp_path)
    assert np.array_equal(loaded.numpy(), images)
    assert named.tolist() == labels.tolist()


def test_missing_data_names_the_package(tmp_path):
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        data.load_split("train", tmp_path)


def test_a_file_of_another_format_is_refused(tmp_path):
    write_split(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    with pytest.raises(ValueError, match="train-images"):
        data.load_split("train", tmp_path)


def test_patches_are_four_by_four_pixels_in_reading_order(tmp_path):
    images = torch.arange(2 * 784).reshape(2, 28, 28)
    tokens = data.to_patches(images)
    assert torch.equal(data.from_patches(tokens), images)
    assert torch.equal(tokens[1, 9].reshape(4, 4), images[1, 4:8, 8:12])
    assert image_ids()[9].tolist() == [0, 1, 2]


def test_samples_span_minus_one_to_one(tmp_path):
    images, _ = write_split(tmp_path)
    item = data.Patches("train", tmp_path)[2]
    assert item["x"].shape == (49, 16)
    assert item["label"] == 2
    expected = torch.from_numpy(images[2]).float() / 127.5 - 1
    torch.testing.assert_close(data.from_patches(item["x"][None])[0], expected)


def test_noised_batches_lie_on_the_straight_line_between_data_and_noise():
    batch = {"x": torch.randn(500, 49, 16), "label": torch.randint(0, 10, (500,))}
    torch.manual_seed(0)
    x, t, labels, target = task.noised(batch)
    torch.testing.assert_close(x - t[:, None, None] * target, batch["x"], rtol=1e-4, atol=1e-4)
    dropped = labels == data.NO_CLASS
    assert 0.05 < dropped.float().mean() < 0.2
    assert torch.equal(labels[~dropped], batch["label"][~dropped])


def test_the_dense_model_starts_as_zero_and_learns_in_every_parameter():
    torch.manual_seed(0)
    model = dense_model()
    kwargs = inputs(torch.randn(2, 49, 16), torch.tensor([0.2, 0.9]), torch.tensor([3, data.NO_CLASS]))
    assert model(**kwargs)[0].abs().max() == 0
    assert kwargs["pooled_projections"][1].tolist() == [0.0] * 10 + [1.0] + [0.0] * 5
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    model(**kwargs)[0].square().sum().backward()
    unused = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert not unused


class Field:
    """Velocity noise - x0 of a known x0 per class, exact for straight lines; records its calls."""

    def __init__(self, uncond: float = 0.0) -> None:
        self.calls: list[tuple[str, float]] = []
        self.context, self.uncond = "", uncond

    @contextmanager
    def cache_context(self, name: str):
        self.context = name
        yield
        self.context = ""

    def __call__(
        self, hidden_states: Tensor, timestep: Tensor, pooled_projections: Tensor, **_: object
    ) -> tuple[Tensor]:
        self.calls.append((self.context, float(timestep[0])))
        label = pooled_projections.argmax(1)
        goal = torch.where(label == data.NO_CLASS, self.uncond, label / 10)[:, None, None]
        return ((hidden_states - goal) / timestep[:, None, None],)


def test_euler_steps_follow_a_straight_flow_to_its_end():
    labels = torch.tensor([0, 4, 8])
    images = sample(Field(), labels, steps=7, guidance=1.0)
    torch.testing.assert_close(images, (labels / 10)[:, None, None].expand(3, 28, 28), rtol=1e-4, atol=1e-4)


def test_guidance_goes_from_the_unconditional_to_beyond_the_asked_class():
    images = sample(Field(uncond=0.1), torch.tensor([2]), steps=5, guidance=3.0)
    assert images.mean().item() == pytest.approx(0.1 + 3 * 0.1, abs=1e-3)


def test_each_branch_has_its_cache_context_and_one_call_per_step():
    field, seen = Field(), []
    sample(field, torch.tensor([1]), steps=4, guidance=2.0, on_step=lambda step, t: seen.append((step, t)))
    assert field.calls == [(name, t) for t in (1.0, 0.75, 0.5, 0.25) for name in ("cond", "uncond")]
    assert seen == [(0, 1.0), (1, 0.75), (2, 0.5), (3, 0.25)]
    field = Field()
    sample(field, torch.tensor([1]), steps=4, guidance=1.0)
    assert {name for name, _ in field.calls} == {"cond"}


def test_samples_depend_on_the_seed_alone():
    class Still:
        def __call__(self, hidden_states: Tensor, **_: object) -> tuple[Tensor]:
            return (torch.zeros_like(hidden_states),)

    first, again, other = (sample(Still(), torch.tensor([1, 2]), steps=1, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_frechet_distance_of_known_gaussians():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(20_000, 3, generator=generator)
    assert judge.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert judge.frechet_distance(a, a + torch.tensor([1.0, 2.0, 0.0])) == pytest.approx(5, rel=1e-3)
    assert judge.frechet_distance(a, 3 * a) == pytest.approx(3 * 4, rel=0.05)


def test_frechet_distance_of_features_that_never_fire():
    a = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    a[:, 2] = 0
    assert judge.frechet_distance(a, a + 1) == pytest.approx(4, rel=1e-3)


def test_a_grid_of_images_is_written(tmp_path):
    save_grid(torch.zeros(13, 28, 28), tmp_path / "grid.png", columns=5)
    assert (tmp_path / "grid.png").read_bytes()[:4] == b"\x89PNG"


def test_results_of_other_models_stay_in_the_file(tmp_path):
    path = tmp_path / "quality.json"
    evaluate.update(path, {"dense": 1, "elastic": 2})
    evaluate.update(path, {"elastic": 3})
    assert json.loads(path.read_text()) == {"dense": 1, "elastic": 3}


def test_an_unknown_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing_here"):
        load_model(str(tmp_path / "nothing_here"))


@needs_weights
def test_weights_in_the_repository_stay_small():
    total = sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file())
    assert total <= 16 * 2**20


@needs_weights
@torch.no_grad()
def test_the_elastic_model_skips_and_narrows():
    model = load_model("elastic")
    recorder = evaluate.Recorder(model)
    sample(recorder, torch.arange(10), steps=FEW_STEPS)
    decisions = recorder.decisions(branches=2, steps=FEW_STEPS)
    assert 0.2 < decisions.gate_rate < 0.9
    assert 0.2 < decisions.mean_width < 0.9
    assert len(decisions.blocks) == 9
    assert len(decisions.rate_per_step) == FEW_STEPS


@pytest.mark.slow
@needs_data
@needs_weights
@pytest.mark.parametrize("name", ["dense", "elastic"])
def test_generated_images_are_of_the_asked_class(name):
    measured = evaluate.quality(load_model(name), judge.load_judge(WEIGHTS / "judge.safetensors"), 100, guidance=2.5)
    assert measured.accuracy >= 0.85


@pytest.mark.slow
@needs_data
def test_the_judge_is_as_good_as_it_says():
    assert judge.test_accuracy(judge.load_judge(WEIGHTS / "judge.safetensors")) >= 0.92


@pytest.mark.slow
@needs_weights
@torch.no_grad()
def test_ordered_channels_make_narrow_generations_better(tmp_path: Path) -> None:
    recording = width_curve.record_generations(load_model("dense"), tmp_path, count=2, steps=4)
    first, held_out = recording
    before = width_curve.qualities(load_model("dense"), [held_out], (0.5,))
    model = load_model("dense")
    order_channels(model, [first], centre=True)
    after = width_curve.qualities(model, [held_out], (0.5, 1.0))
    assert after[0].value > before[0].value + 2
    assert after[1].value > 60
