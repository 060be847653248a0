"""Models that no library knows: in plain PyTorch, with and without a glue that can be exported."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import edit_compile
from edit_compile import CompiledTransformer, EditError, RoutingPolicy, ScheduledPolicy
from runtime import engines
from tests.models import PlainDiT, randomised, tiny_plain


class Moody(PlainDiT):
    """Its glue depends on its data, which no export can follow."""

    def forward(self, x: Tensor, t: Tensor, words: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x if x.abs().max() < 100 else x / 100, t, words, mask)


@pytest.mark.parametrize(("kind", "file"), [(PlainDiT, "glue/0.pt2"), (Moody, None)])
def test_plain_models_compile_standalone_or_hosted(
    kind: type, file: str | None, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.INFO, logger="passes.pipeline")
    _, inputs = tiny_plain()
    model = randomised(kind())
    elastic = edit_compile.elasticize(model)
    compiled = edit_compile.compile(elastic, inputs=inputs, engine="torch", policy=RoutingPolicy(margin=0.0))
    (glue,) = compiled.program.manifest.glues
    assert glue.file == file
    assert glue.flops > 0
    assert ("hosted by the model" in caplog.text) == (file is None)
    with torch.no_grad():
        expected = model(**inputs)
    output = compiled(**inputs)
    assert (output - expected).abs().max() <= 1e-4 * expected.abs().max()
    compiled.policy = ScheduledPolicy([[0.0, 1.0, 0.25]])
    changed = compiled(**inputs)
    assert not torch.allclose(changed, expected, rtol=1e-3)
    compiled.save(tmp_path / "plain.edit")
    loaded = edit_compile.load(tmp_path / "plain.edit", engine="torch")
    if file is None:
        with pytest.raises(EditError, match="hosted"):
            loaded(**inputs)
    else:
        loaded.policy = compiled.policy
        torch.testing.assert_close(loaded(**inputs), changed)


class Own:
    """What a model gives, in a class that nothing knows."""

    def __init__(self, sample: Tensor) -> None:
        self.sample = sample

    def to_tuple(self) -> tuple[Tensor]:
        return (self.sample,)


class Reusing(PlainDiT):
    """Writes what it gives into memory that it gave before."""

    def forward(self, x: Tensor, t: Tensor, words: Tensor, mask: Tensor | None = None) -> Own:
        made = super().forward(x, t, words, mask)
        place = self.__dict__.setdefault("places", {}).setdefault(tuple(made.shape), torch.empty_like(made))
        return Own(place.copy_(made))


@pytest.mark.filterwarnings("ignore:.*has no routers")
def test_what_a_model_gave_is_kept_though_it_writes_over_it() -> None:
    _, inputs = tiny_plain()
    model = randomised(Reusing())
    compiled = edit_compile.compile(model, inputs=inputs, engine="torch")
    with torch.no_grad():
        expected = model(**inputs).sample.clone()
    torch.testing.assert_close(compiled(**inputs).sample, expected, rtol=1e-4, atol=1e-4)


def test_the_timestep_can_be_named() -> None:
    model, inputs = tiny_plain()
    with pytest.warns(UserWarning, match="no routers"):
        compiled = edit_compile.compile(model, inputs=inputs, engine="torch", timestep="t")
    assert compiled.program.manifest.timestep == "t"


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.filterwarnings("ignore:.*has no routers")
def test_a_program_does_not_follow_its_model_when_that_is_trained_on(tmp_path: Path, saved: bool) -> None:
    model, inputs = tiny_plain()
    output = tmp_path / "plain.edit" if saved else None
    compiled = edit_compile.compile(model, [0.5, 1], inputs=inputs, engine="torch", output=output)
    before = compiled(**inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(compiled(**inputs), before)
    if saved:
        torch.testing.assert_close(edit_compile.load(output, engine="torch")(**inputs), before)


@pytest.mark.filterwarnings("ignore:.*has no routers")
def test_a_bundle_that_another_writer_puts_in_its_place_is_not_what_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = tiny_plain()
    other, _ = tiny_plain(seed=1)
    edit_compile.compile(other, inputs=inputs, engine="torch", output=tmp_path / "other.edit")
    honest = CompiledTransformer.save

    def overtaken(self: CompiledTransformer, path: Path) -> str:
        digest = honest(self, path)
        shutil.rmtree(path)
        shutil.copytree(tmp_path / "other.edit", path)
        return digest

    monkeypatch.setattr(CompiledTransformer, "save", overtaken)
    compiled = edit_compile.compile(model, inputs=inputs, engine="torch", output=tmp_path / "plain.edit")
    with torch.no_grad():
        expected = model(**inputs)
        for parameter in model.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(compiled(**inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*has no routers")
def test_the_bundles_weights_are_brought_to_where_the_engine_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = tiny_plain()
    placed, seen = engines.placed, []
    monkeypatch.setattr(engines, "placed", lambda name, program: seen.append(program) or placed(name, program))
    compiled = edit_compile.compile(model, inputs=inputs, engine="torch", output=tmp_path / "plain.edit")
    assert all(weight is seen[-1].weights[key] for key, weight in compiled.program.weights.items())


def test_a_bundle_whose_engine_disagrees_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_plain()
    honest = CompiledTransformer.forward
    monkeypatch.setattr(
        CompiledTransformer,
        "forward",
        lambda self, **kwargs: honest(self, **kwargs) * 1.01,
    )
    with (
        pytest.raises(EditError, match=r"torch engine with blocks at width 0\.5, 1 differs"),
        pytest.warns(UserWarning),
    ):
        edit_compile.compile(model, [0.5, 1], inputs=inputs, engine="torch", output=tmp_path / "plain.edit")
    assert not list(tmp_path.iterdir())


def test_every_width_a_router_may_choose_has_to_be_built() -> None:
    model, inputs = tiny_plain()
    with pytest.raises(EditError, match=r"width 0\.25 is not built"):
        edit_compile.compile(edit_compile.elasticize(model), [0.5, 1], inputs=inputs)
