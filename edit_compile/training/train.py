"""One trainer for the dense and the elastic phase: the user gives a `Task`, `train` does the rest.

Data order and random numbers are pure functions of (seed, step, rank, micro step), so a run killed at any step goes
on from its newest checkpoint with exactly the losses that an uninterrupted run would have had.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from edit_compile.files import write_file_atomically
from edit_compile.training.average import Ema
from edit_compile.training.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from edit_compile.training.optimizer import load_states, make_optimizer, states_of
from edit_compile.training.order import StepSampler, seed_of
from edit_compile.training.sharding import shard, whole

log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on: the message names the step and what was wrong."""


class Task(Protocol):
    """What a user writes to train a model."""

    def model(self) -> nn.Module:
        """The module to train, initialised; called once, under the run's seed."""

    def dataset(self) -> Dataset[Any]:
        """A map-style dataset with `__len__` and `__getitem__`; samples are joined by torch's default collation."""

    def loss(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        """Losses of one batch. "loss" (a scalar) is minimised; every other entry, scalar or vector, is only logged.

        Draw all random numbers from torch's global generator: it is seeded for this step before the call. A task with
        a method `begin_step(step, steps)` is told before each optimizer step where the run is; one with an `identity`
        (a string) only goes on from checkpoints of a task with the same.
        """


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run.

    The learning rate rises over `warmup_steps`, stays, and falls linearly to zero in the last `decay_steps`.
    `batch_size` counts samples per process and micro step; `ema_decay` is the average's decay per step (it starts
    smaller); without one (0 or None) none is kept. Frozen parameters are neither averaged nor optimised.
    `precision` "bfloat16" computes under autocast, with parameters as they are (float32, if they are trained) and
    routers in their own dtype. `shard` splits parameters, gradients, averages and the optimiser's states over the
    processes (FSDP2); without it each process has all (DDP). `lr_multipliers` are (substring of a parameter name,
    factor) pairs; the first that matches counts.
    """

    output: Path
    steps: int
    batch_size: int
    lr: float = 1e-3
    warmup_steps: int = 100
    decay_steps: int = 1000
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    ema_decay: float | None = 0.999
    accumulate: int = 1
    seed: int = 0
    checkpoint_every: int = 200
    keep: int = 2
    log_every: int = 10
    workers: int = 0
    compile: bool = False
    cpu: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    shard: bool = False
    lr_multipliers: tuple[tuple[str, float], ...] = ()


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of optimizer step `step` (counted from 0)."""
    rise = (step + 1) / config.warmup_steps if config.warmup_steps else 1.0
    fall = (config.steps - step) / config.decay_steps if config.decay_steps else 1.0
    return config.lr * max(0.0, min(1.0, rise, fall))


def train(task: Task, config: TrainConfig) -> Path:
    """Run, or go on with, the training in `config.output`; returns the last checkpoint's folder.

    Writes `metrics.jsonl` and `checkpoints/step-XXXXXXXX/`. Works in one process, and in several under `accelerate
    launch` or torchrun (on CPUs torchrun: `accelerate launch --cpu` starts a single process without an MPI).

    Raises:
        TrainingError: a gradient is not finite.
        CheckpointError: the newest checkpoint cannot be read.
        OptimizerError: nothing is to be trained, or something else than the newest checkpoint did.
    """
    return _Run(task, config).run()


class _Run:
    def __init__(self, task: Task, config: TrainConfig) -> None:
        self.task, self.config = task, config
        self.accelerator = Accelerator(cpu=config.cpu, gradient_accumulation_steps=config.accumulate)
        torch.manual_seed(config.seed)
        self.module = task.model()
        checkpoint = self._newest()
        if checkpoint is not None:
            self.module.load_state_dict(checkpoint.model)
        self.step = checkpoint.step if checkpoint is not None else 0
        self.sharded = config.shard and self.accelerator.num_processes > 1
        if self.sharded:
            shard(self.module, self.accelerator.device, self.accelerator.num_processes)
        else:
            self.module.to(self.accelerator.device)
        self.optimizer = make_optimizer(self.module, config)
        self.ema = Ema(self.module, config.ema_decay, checkpoint.ema if checkpoint is not None else None)
        if checkpoint is not None:
            load_states(self.optimizer, checkpoint.optimizer)
        if config.compile:
            self.module.compile()
        self.prepared_optimizer = self.accelerator.prepare(self.optimizer)
        self.prepared = self.module if self.sharded else self.accelerator.prepare(self.module)

    def run(self) -> Path:
        batches, started, seen = self._batches(), time.perf_counter(), 0
        with self._progress() as progress:
            bar = progress.add_task("train", total=self.config.steps, completed=self.step)
            while self.step < self.config.steps:
                metrics = self._optimizer_step(batches)
                self.step += 1
                seen += self.config.batch_size * self.config.accumulate * self.accelerator.num_processes
                progress.update(bar, completed=self.step)
                if self.step % self.config.log_every == 0 or self.step == self.config.steps:
                    self._log(metrics | {"samples_per_second": seen / (time.perf_counter() - started)})
                    started, seen = time.perf_counter(), 0
                if self.step % self.config.checkpoint_every == 0 or self.step == self.config.steps:
                    self._save()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return self._folder / f"step-{self.step:08d}"

    def _optimizer_step(self, batches: Iterator[Any]) -> dict[str, Any]:
        self.prepared.train()
        getattr(self.task, "begin_step", lambda *_: None)(self.step, self.config.steps)
        rate = learning_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_multiplier"]
        sums: dict[str, Tensor] = {}
        norm: Any = 0.0
        for micro in range(self.config.accumulate):
            batch = _to_device(next(batches), self.accelerator.device)
            torch.manual_seed(seed_of(self.config.seed, 1 + self.step, micro, self.accelerator.process_index))
            with self.accelerator.accumulate(self.prepared):
                with torch.autocast(self.accelerator.device.type, torch.bfloat16, self.config.precision == "bfloat16"):
                    losses = self.task.loss(self.prepared, batch)
                self.accelerator.backward(losses["loss"])
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.prepared.parameters(), self.config.clip)
                    self._check(norm, losses["loss"])
                self.prepared_optimizer.step()
                self.prepared_optimizer.zero_grad()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach().float() / self.config.accumulate
        self.ema.update(self.module, self.step)
        return {**sums, "lr": rate, "grad_norm": float(norm)}

    def _check(self, norm: Any, loss: Tensor) -> None:
        if not math.isfinite(float(norm)):
            raise TrainingError(
                f"step {self.step}: the gradient's norm is {float(norm)} at loss {float(loss.detach())}; the weights "
                f"in {self._folder} are from before it: resume with a smaller lr, or look at this step's batch"
            )

    def _batches(self) -> Iterator[Any]:
        dataset: Any = self.task.dataset()
        sampler = StepSampler(
            len(dataset),
            self.config.batch_size,
            self.config.seed,
            start=self.step * self.config.accumulate,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        # Its own generator: the loader would otherwise draw a worker seed from the global one.
        generator = torch.Generator().manual_seed(seed_of(self.config.seed, self.step))
        return iter(DataLoader(dataset, batch_sampler=sampler, num_workers=self.config.workers, generator=generator))

    def _log(self, metrics: dict[str, Any]) -> None:
        reduced = {n: self.accelerator.reduce(v, "mean") if isinstance(v, Tensor) else v for n, v in metrics.items()}
        if not self.accelerator.is_main_process:
            return
        record = {"step": self.step} | {
            name: [float(f"{x:.6g}") for x in value.flatten().tolist()]
            if isinstance(value, Tensor) and value.ndim
            else float(f"{float(value):.9g}")
            for name, value in reduced.items()
        }
        with (self.config.output / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    @property
    def _folder(self) -> Path:
        return self.config.output / "checkpoints"

    def _save(self) -> None:
        checkpoint = Checkpoint(
            self.step,
            self._on_main(self.module.state_dict()),
            self._on_main(self.ema.values),
            self._on_main(states_of(self.optimizer)),
            _plain(self.config) | {"task": self._identity},
        )
        if self.accelerator.is_main_process:
            save_checkpoint(self._folder, checkpoint, self.config.keep)
        self.accelerator.wait_for_everyone()

    def _on_main(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies in the main process's memory, one tensor gathered at a time; nothing in the others."""
        kept = {}
        for name, tensor in tensors.items():
            full = whole(tensor.detach())
            if self.accelerator.is_main_process:
                kept[name] = full.to("cpu", copy=True)
        return kept

    def _newest(self) -> Checkpoint | None:
        """The checkpoint to go on from, None for a new run."""
        self.config.output.mkdir(parents=True, exist_ok=True)
        found = list_checkpoints(self._folder)
        checkpoint = load_checkpoint(found[-1]) if found else None
        self.accelerator.wait_for_everyone()
        self._trim_metrics(checkpoint.step if checkpoint is not None else 0)
        if checkpoint is not None:
            if checkpoint.config.get("task") != self._identity:
                raise TrainingError(
                    f"{self.config.output} holds a run of something else: give another folder for the run "
                    "(TrainConfig(output); on the command line --output of train, --run of distil)"
                )
            before, now = checkpoint.config, json.loads(json.dumps(_plain(self.config)))
            changed = sorted(name for name in now if name in before and before[name] != now[name])
            if changed:
                log.warning("%s goes on with other settings than it began with: %s", found[-1], ", ".join(changed))
            log.info("resumed %s at step %d", found[-1], checkpoint.step)
        return checkpoint

    @property
    def _identity(self) -> str | None:
        """What the task says it is."""
        return getattr(self.task, "identity", None)

    def _trim_metrics(self, step: int) -> None:
        """Drop the records of steps that will be run again."""
        path = self.config.output / "metrics.jsonl"
        if path.is_file() and self.accelerator.is_main_process:
            lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
            write_file_atomically(path, "".join(line + "\n" for line in lines))

    def _progress(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        return Progress(*columns, disable=not self.accelerator.is_main_process)


def _plain(config: TrainConfig) -> dict[str, Any]:
    """The settings as JSON holds them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: _to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [_to_device(value, device) for value in batch]
    return batch
