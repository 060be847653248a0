"""The trainer: schedule, data order, resume, averages, checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Dataset

from edit_compile.training.average import Ema
from edit_compile.training.checkpoint import CheckpointError, list_checkpoints, load_checkpoint
from edit_compile.training.order import StepSampler, seed_of
from edit_compile.training.train import TrainConfig, TrainingError, learning_rate, train


class Numbers(Dataset[Tensor]):
    def __len__(self) -> int:
        return 37

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((4,), index / 37)


class Killed(Exception):
    pass


class NoisyTask:
    """A regression whose loss draws noise and whose model drops out; `die_at` raises after so many losses."""

    def __init__(self, die_at: int | None = None) -> None:
        self.die_at, self.calls = die_at, 0

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.GELU(), nn.Linear(8, 4))

    def dataset(self) -> Numbers:
        return Numbers()

    def loss(self, model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        if self.calls == self.die_at:
            raise Killed
        self.calls += 1
        loss = (model(batch + 0.1 * torch.randn_like(batch)) - batch).square().mean()
        return {"loss": loss, "parts": batch.mean(0)}


def config_for(folder: Path, **changes: object) -> TrainConfig:
    base = TrainConfig(
        output=folder, steps=10, batch_size=5, warmup_steps=2, decay_steps=4, checkpoint_every=3, log_every=1, cpu=True
    )
    return replace(base, **changes)


def records(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "samples_per_second"} for line in lines]


@pytest.mark.parametrize("killed_after", [1, 3, 5, 8])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_killed_run_goes_on_with_the_losses_of_an_uninterrupted_one(tmp_path, killed_after, accumulate):
    whole = config_for(tmp_path / "whole", accumulate=accumulate)
    broken = config_for(tmp_path / "broken", accumulate=accumulate)
    train(NoisyTask(), whole)
    with pytest.raises(Killed):
        train(NoisyTask(die_at=killed_after * accumulate), broken)
    train(NoisyTask(), broken)
    assert records(broken.output) == records(whole.output)
    first, second = (load_checkpoint(list_checkpoints(c.output / "checkpoints")[-1]) for c in (whole, broken))
    for part in ("model", "ema", "optimizer"):
        ours, theirs = getattr(first, part), getattr(second, part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_finished_run_is_not_run_again(tmp_path):
    config = config_for(tmp_path)
    train(NoisyTask(), config)
    assert train(NoisyTask(die_at=0), config).name == "step-00000010"


def test_training_lowers_the_loss_and_logs_every_part(tmp_path):
    train(NoisyTask(), config_for(tmp_path, steps=200, lr=1e-2, log_every=50, checkpoint_every=200))
    log = records(tmp_path)
    assert [line["step"] for line in log] == [50, 100, 150, 200]
    assert log[-1]["loss"] < 0.1
    assert len(log[0]["parts"]) == 4
    assert {"lr", "grad_norm"} <= log[0].keys()


def test_accumulated_steps_equal_one_large_step(tmp_path):

    train(PlainTask(), config_for(tmp_path / "one", batch_size=6, clip=1e9))
    train(PlainTask(), config_for(tmp_path / "two", batch_size=3, accumulate=2, clip=1e9))
    one, two = (load_checkpoint(tmp_path / name / "checkpoints" / "step-00000010").model for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)


def test_learning_rate_rises_stays_and_falls_to_zero():
    config = TrainConfig(output=Path(), steps=100, batch_size=1, lr=1.0, warmup_steps=10, decay_steps=20)
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:80] == [1.0] * 70
    assert rates[90] == pytest.approx(0.5)
    assert rates[100] == 0.0


def test_learning_rate_multiplier_acts_on_the_named_parameters(tmp_path):
    train(NoisyTask(), config_for(tmp_path, lr_multipliers=(("0.", 0.0),), weight_decay=0.0))
    torch.manual_seed(0)
    initial = NoisyTask().model().state_dict()
    trained = load_checkpoint(tmp_path / "checkpoints" / "step-00000010").model
    assert torch.equal(trained["0.weight"], initial["0.weight"])
    assert not torch.equal(trained["3.weight"], initial["3.weight"])


@given(length=st.integers(1, 30), batch=st.integers(1, 7), world=st.integers(1, 3), start=st.integers(0, 20))
def test_every_epoch_is_a_permutation_and_order_depends_on_the_step_alone(length, batch, world, start):
    def positions(first: int, count: int) -> list[int]:
        ranks = [iter(StepSampler(length, batch, 7, first, rank, world)) for rank in range(world)]
        return [index for _ in range(count) for rank in ranks for index in next(rank)]

    whole = positions(0, start + 10)
    assert positions(start, 10) == whole[start * batch * world :]
    for epoch in range(len(whole) // length):
        assert sorted(whole[epoch * length : (epoch + 1) * length]) == list(range(length))


def test_the_sampler_refuses_an_empty_dataset():
    with pytest.raises(ValueError, match="empty"):
        StepSampler(0, 1, 0)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=4), st.integers(0, 3))
def test_seeds_differ_between_steps_and_fit_torch(parts, position):
    changed = list(parts)
    changed[position % len(parts)] += 1
    assert seed_of(*parts) != seed_of(*changed)
    assert 0 <= seed_of(*parts) < 2**63


def test_the_average_follows_the_parameters():
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    ema = Ema(module, 0.9)
    nn.init.ones_(module.weight)
    ema.update(module, step=10**9)
    assert ema.values["weight"].item() == pytest.approx(0.1)
    ema.update(module, step=0)
    assert ema.values["weight"].item() == pytest.approx(0.1 + 0.9 * 0.9)


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path):
    path = train(NoisyTask(), config_for(tmp_path, steps=3))
    (path / "ema.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(CheckpointError, match=path.name):
        load_checkpoint(path)


def test_half_written_and_old_checkpoints_do_not_stay(tmp_path):
    train(NoisyTask(), config_for(tmp_path, steps=12, keep=2))
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000009", "step-00000012"]
    (folder / "step-00000099").mkdir()
    assert list_checkpoints(folder)[-1].name == "step-00000012"


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_spoils_a_checkpoint(tmp_path):
    class Broken(NoisyTask):
        def loss(self, model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
            losses = super().loss(model, batch)
            return {"loss": losses["loss"] * (float("nan") if self.calls == 5 else 1.0)}

    with pytest.raises(TrainingError, match="step 4"):
        train(Broken(), config_for(tmp_path))
    (kept,) = list_checkpoints(tmp_path / "checkpoints")
    assert all(torch.isfinite(value).all() for value in load_checkpoint(kept).model.values())


def test_a_resumed_run_says_which_settings_changed(tmp_path, caplog):
    train(NoisyTask(), config_for(tmp_path))
    train(NoisyTask(), config_for(tmp_path, steps=12, lr=2e-3))
    assert "lr, steps" in caplog.text
    caplog.clear()
    train(NoisyTask(), config_for(tmp_path, steps=12, lr=2e-3))
    assert "other settings" not in caplog.text


def test_checkpoints_hold_no_pickle(tmp_path):
    path = train(NoisyTask(), config_for(tmp_path, steps=3))
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


@pytest.mark.slow
def test_two_processes_share_the_batches_and_agree_with_one(tmp_path):
    script = (
        "import sys; from pathlib import Path; from tests.test_train import PlainTask, config_for\n"
        "from edit_compile.training.train import train\n"
        "train(PlainTask(), config_for(Path(sys.argv[1]), batch_size=int(sys.argv[2])))\n"
    )
    (tmp_path / "run.py").write_text(script)
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    # `accelerate launch --cpu` starts one process whatever --num_processes says, unless it is given an MPI.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for command, batch in ((launch, 3), ([sys.executable], 6)):
        arguments = [*command, str(tmp_path / "run.py"), str(tmp_path / str(batch)), str(batch)]
        subprocess.run(arguments, check=True, env=environment, cwd=root, timeout=240)
    two, one = (load_checkpoint(tmp_path / batch / "checkpoints" / "step-00000010") for batch in ("3", "6"))
    for name in one.model:
        # Adam divides by the gradient's size, so the order of summation shows; each weight moved by about 1e-2.
        torch.testing.assert_close(one.model[name], two.model[name], rtol=0, atol=1e-4)
    for ours, theirs in zip(records(tmp_path / "6"), records(tmp_path / "3"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


class PlainTask(NoisyTask):
    """No noise and no dropout, so that the number of processes must not matter."""

    def model(self) -> nn.Module:
        return nn.Linear(4, 4)

    def loss(self, model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        return {"loss": (model(batch) - 1).square().mean()}
