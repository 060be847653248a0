"""Training at real size: parameters split over processes, half precision, adapters, averages of what is trained."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import cast_training_params
from torch import Tensor, nn
from typer.testing import CliRunner

import edit_compile
from edit_compile import ElasticTransformer, RoutingPolicy
from edit_compile.cli import app
from edit_compile.loading import load_object
from edit_compile.training.checkpoint import list_checkpoints, load_checkpoint
from edit_compile.training.optimizer import OptimizerError
from edit_compile.training.train import train
from tests.models import tiny_flux
from tests.sizes import FluxTask, config_for

ROOT = Path(__file__).parent.parent


def run(runs: list[tuple[Path, dict[str, Any]]], processes: int = 2) -> None:
    """The runs one after the other, in processes of their own."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    given = json.dumps([(str(folder), changes) for folder, changes in runs])
    command = [sys.executable, *launch, "-m", "tests.sizes", given]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, cwd=ROOT, timeout=240)


def losses(folder: Path, name: str = "loss") -> list[float]:
    return [json.loads(line)[name] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_that_share_the_parameters_train_as_two_that_do_not(tmp_path: Path) -> None:
    whole, split, stopped = (tmp_path / name for name in ("whole", "split", "stopped"))
    sharded = {"shard": True, "accumulate": 2}
    run([(whole, {"accumulate": 2}), (split, sharded), (stopped, sharded | {"steps": 3}), (stopped, sharded)])
    assert losses(split) == pytest.approx(losses(whole), rel=1e-4)
    assert losses(split, "grad_norm") == pytest.approx(losses(whole, "grad_norm"), rel=1e-3)
    assert losses(stopped) == losses(split)
    ends = [load_checkpoint(list_checkpoints(folder / "checkpoints")[-1]) for folder in (whole, split, stopped)]
    for part in ("model", "ema", "optimizer"):
        expected, ours, resumed = (getattr(end, part) for end in ends)
        assert ours.keys() == expected.keys()
        assert {name: value.shape for name, value in ours.items()} == {n: v.shape for n, v in expected.items()}
        assert all(torch.equal(resumed[name], ours[name]) for name in ours)
        if part != "optimizer":
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-3)
    alone = config_for(stopped, steps=8, batch_size=4, **sharded)
    train(FluxTask(), alone)  # one process goes on from the checkpoint of two
    train(FluxTask(), config_for(split, steps=8, batch_size=4, accumulate=2))
    assert losses(stopped) == losses(split)


class LoraTask(FluxTask):
    """Routers in float32 and low-rank adapters over a frozen model in bfloat16."""

    router_dtype = torch.float32

    def prepared(self, model: nn.Module) -> nn.Module:
        peft = pytest.importorskip("peft")
        model.to(self.backbone).requires_grad_(False)
        torch.manual_seed(0)
        targets = ["net.2", "net.0.proj", "to_q", "proj_mlp", "single_transformer_blocks.0.proj_out"]
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=targets), model)
        cast_training_params(model)
        return model

    backbone = torch.float32

    def loss(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return super().loss(model, {name: value.to(self.backbone) for name, value in batch.items()})


class HalfLoraTask(LoraTask):
    backbone = torch.bfloat16


@pytest.mark.parametrize("task", [LoraTask, HalfLoraTask])
def test_adapters_and_routers_are_trained_alone_then_fused_and_compiled(task: type[LoraTask], tmp_path: Path) -> None:
    config = config_for(tmp_path, steps=3, lr=1e-2)
    checkpoint = load_checkpoint(train(task(), config))
    trained = {name for name in checkpoint.model if name.startswith("routers.") or "lora_" in name}
    assert checkpoint.ema.keys() == trained
    assert {name.rpartition("/")[0] for name in checkpoint.optimizer} == trained
    before = task().model()
    moved = {name for name, value in before.state_dict().items() if not torch.equal(value, checkpoint.model[name])}
    assert moved <= trained
    assert {name for name in trained if "lora_B" in name} < moved
    assert {before.get_parameter(name).dtype for name in trained} == {torch.float32}
    before.load_state_dict(checkpoint.ema, strict=False)
    elastic = before.eval()
    for layer in (module for module in elastic.modules() if hasattr(module, "get_base_layer")):
        layer.merge()
    inputs = {
        name: v.to(task.backbone) if v.ndim > 2 or name == "pooled_projections" else v
        for name, v in {**tiny_flux(double=1, single=1)[1]}.items()
    } | {"return_dict": False}
    compiled = edit_compile.compile(elastic, inputs=inputs, engine="torch", policy=RoutingPolicy(margin=0.0))
    with torch.no_grad():
        ours, eager = compiled(**inputs)[0], elastic(**inputs)[0]
    tolerance = 1e-3 if task.backbone == torch.float32 else 5e-2
    torch.testing.assert_close(ours, eager, rtol=tolerance, atol=tolerance)


def test_what_was_trained_is_not_frozen_unnoticed(tmp_path: Path) -> None:
    class Frozen(FluxTask):
        def model(self) -> Any:
            elastic = super().model()
            elastic.model.requires_grad_(False)
            return elastic

    config = config_for(tmp_path, steps=1)
    train(FluxTask(), config)
    with pytest.raises(OptimizerError, match=r"states of model\..*frozen or not there"):
        train(Frozen(), config_for(tmp_path, steps=2))

    class Nothing(Frozen):
        def model(self) -> Any:
            return super().model().requires_grad_(False)

    with pytest.raises(OptimizerError, match="nothing to train"):
        train(Nothing(), config_for(tmp_path / "other"))


def test_without_an_average_none_is_kept(tmp_path: Path) -> None:
    kept = [load_checkpoint(train(FluxTask(), config_for(tmp_path / str(d), steps=1, ema_decay=d))) for d in (0, None)]
    assert all(not checkpoint.ema and checkpoint.model for checkpoint in kept)
    went_on = load_checkpoint(train(FluxTask(), config_for(tmp_path / "0", steps=2, ema_decay=0.9)))
    assert went_on.ema.keys() == went_on.model.keys()


class Watching(FluxTask):
    """Notes the dtypes that a router computes in, and that its block gets."""

    def model(self) -> ElasticTransformer:
        elastic = super().model()
        self.seen: set[tuple[torch.dtype, ...]] = set()
        elastic.routers[0].hidden.register_forward_pre_hook(lambda *_: None)
        elastic.routers[0].register_forward_hook(lambda _, args, out: self.seen.add((out[0].dtype, out[1].dtype)))
        elastic.model.transformer_blocks[0].ff.net[2].register_forward_hook(
            lambda _, args, out: self.seen.add((out.dtype,))
        )
        return elastic


def test_autocast_leaves_routers_and_parameters_in_float32(tmp_path: Path) -> None:
    task = Watching()
    checkpoint = load_checkpoint(train(task, config_for(tmp_path / "half", precision="bfloat16")))
    assert task.seen == {(torch.float32, torch.float32), (torch.bfloat16,)}
    assert {value.dtype for value in checkpoint.model.values()} == {torch.float32}
    train(FluxTask(), config_for(tmp_path / "full"))
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "full"), rel=0.05)
    assert losses(tmp_path / "half") != losses(tmp_path / "full")


def test_parameters_trained_in_half_precision_are_warned_of(tmp_path: Path, caplog: Any) -> None:
    class Half(HalfLoraTask):
        def prepared(self, model: nn.Module) -> nn.Module:
            return model.to(torch.bfloat16)

    train(Half(), config_for(tmp_path, steps=1))
    assert "trained in half precision" in caplog.text
    caplog.clear()
    train(HalfLoraTask(), config_for(tmp_path / "lora", steps=1))
    assert "half precision" not in caplog.text


def test_routers_keep_a_dtype_of_their_own(tmp_path: Path) -> None:
    elastic = HalfLoraTask().model()
    for changed in (elastic, elastic.to(torch.float64), elastic.half(), elastic.to(torch.bfloat16)):
        assert {p.dtype for p in changed.routers.parameters()} == {torch.float32}
    assert elastic.model.proj_out.weight.dtype == torch.bfloat16
    plain = FluxTask().model().to(torch.bfloat16)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    plain.router_dtype = torch.float32
    plain.routers.float()
    plain.save_pretrained(tmp_path, dtype=torch.bfloat16)
    again = edit_compile.load_elastic(tmp_path, tiny_flux(double=1, single=1)[0].to(torch.bfloat16))
    assert again.router_dtype == torch.float32
    assert {p.dtype for p in again.routers.parameters()} == {torch.float32}
    assert {p.dtype for p in again.model.parameters()} == {torch.bfloat16}
    assert again.to("meta").routers[0].gate.weight.is_meta


@pytest.mark.filterwarnings("ignore")
def test_the_example_of_the_documentation_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, after, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.DOTALL)
    (tmp_path / "task.py").write_text(task)
    monkeypatch.chdir(tmp_path)
    settings = ["steps=2", "batch_size=1", "precision=bfloat16", "cpu=true"]
    result = CliRunner().invoke(app, ["train", "task.py:RouterTask", *settings, "--output", "runs/routers"])
    assert result.exit_code == 0, result.output
    exec(after, {"RouterTask": load_object("task.py:RouterTask")})
    assert edit_compile.load_elastic(tmp_path / "elastic").router_dtype == torch.float32
