"""The authors' checkpoint: read whole or refused by name, its routers as they wrote them, compiled as eager runs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import edit_compile
from edit_compile import ElasticError, ElasticTransformer
from edit_compile.release import NARROW, POLICY
from passes.check import check_equal
from runtime.bundle.spec import RouterConfig
from runtime.face.transformer import CompiledTransformer
from runtime.requests.trace import COMPUTED, REUSED, SKIPPED
from runtime.routing.router import Router
from tests.zoo import CASES

DIM, HIDDEN, BLOCKS = 48, 16, 2
Weights = dict[str, Tensor]


def qwen() -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model of the checkpoint's class, and inputs of a batch of two."""
    case = CASES["QwenImageTransformer2DModel"]()
    return case.model, case.inputs


def router_weights(index: int) -> Weights:
    """One router of the layout, so far from its start that gates and widths differ between inputs."""
    generator = torch.Generator().manual_seed(11 * index)

    def linear(name: str, rows: int, columns: int, scale: float) -> Weights:
        weight = torch.randn(rows, columns, generator=generator) * scale
        return {f"{name}.weight": weight, f"{name}.bias": torch.randn(rows, generator=generator) * 0.1}

    named = (
        linear("img_mod.1", 3 * DIM, DIM, 1.0)
        | linear("out.0", HIDDEN, DIM, 0.5)
        | linear("out.2", 1, HIDDEN, 0.4)
        | linear("width_head", 4, HIDDEN, 1.5)
    )
    return {f"gate_mlps.{index}.{name}": value for name, value in named.items()}


def checkpoint() -> Weights:
    """One state dict: the model's, with MLPs that weigh more than a fresh model's, and its routers'."""
    own = {key: value * (4.0 if "_mlp." in key else 0.9) for key, value in qwen()[0].state_dict().items()}
    routers = [router_weights(index) for index in range(BLOCKS)]
    return own | {key: value for router in routers for key, value in router.items()}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("release") / "model.safetensors"
    save_file(checkpoint(), path)
    return path


class TheirRouter:
    """A router as the checkpoint means it: silu, a linear to shift, scale and nothing; relu; token means."""

    def __init__(self, weights: Weights, index: int) -> None:
        prefix = f"gate_mlps.{index}."
        self.w = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}

    def __call__(self, text: Tensor, image: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale, _ = self._linear("img_mod.1", F.silu(temb)).chunk(3, dim=-1)
        tokens = F.layer_norm(torch.cat([text, image], 1), (DIM,), eps=1e-6)
        hidden = F.relu(self._linear("out.0", tokens * (1 + scale[:, None]) + shift[:, None]))
        return self._linear("out.2", hidden).mean(1)[:, 0], self._linear("width_head", hidden).mean(1)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]


class QuickUp(nn.Module):
    """x sigmoid(1.702 x) of an up-projection."""

    def __init__(self, proj: nn.Linear) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.proj(x)
        return hidden / (1 + torch.exp(-1.702 * hidden))


class TheirBlock(nn.Module):
    """A block of the checkpoint's model, row by row: skipped, or its image MLP cut to the first channels."""

    def __init__(self, block: nn.Module, router: TheirRouter) -> None:
        super().__init__()
        self.block, self.router = block, router
        self.done: list[tuple[float, float]] = []
        for mlp in (block.img_mlp, block.txt_mlp):
            mlp.net[0] = QuickUp(mlp.net[0].proj)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, **kwargs: Any) -> Any:
        gate, width = self.router(encoder_hidden_states, hidden_states, temb)
        rows = []
        for row in range(len(gate)):
            share = (int(width[row].argmax()) + 1) / 4
            self.done.append((float(torch.sigmoid(gate[row])), share))
            texts, images = self._at(share, hidden_states, encoder_hidden_states, temb, kwargs)
            keep = torch.sigmoid(gate[row]) < 0.5
            rows.append((encoder_hidden_states[row], hidden_states[row]) if keep else (texts[row], images[row]))
        return tuple(torch.stack(states) for states in zip(*rows, strict=True))

    def _at(self, share: float, image: Tensor, text: Tensor, temb: Tensor, kwargs: dict[str, Any]) -> Any:
        down = self.block.img_mlp.net[2]
        kept, whole = int(share * down.in_features), down.weight.data
        down.weight.data = torch.cat([whole[:, :kept], torch.zeros_like(whole[:, kept:])], 1)
        try:
            return self.block(hidden_states=image, encoder_hidden_states=text, temb=temb, **kwargs)
        finally:
            down.weight.data = whole


def theirs() -> tuple[nn.Module, list[TheirBlock]]:
    """The checkpoint's model without edit_compile."""
    model, weights = qwen()[0], checkpoint()
    model.load_state_dict({key: value for key, value in weights.items() if not key.startswith("gate_mlps")})
    blocks = [TheirBlock(block, TheirRouter(weights, i)) for i, block in enumerate(model.transformer_blocks)]
    model.transformer_blocks = nn.ModuleList(blocks)
    return model, blocks


def at(step: int) -> dict[str, Any]:
    """The inputs at a step, with latents of its own."""
    copied = pytree.tree_map_only(Tensor, Tensor.clone, qwen()[1])
    copied["timestep"] = torch.full((2,), 0.99 - 0.03 * step)
    copied["hidden_states"] += 0.3 * torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(step))
    return copied


def test_the_routers_logits_are_those_of_their_form(file: Path) -> None:
    elastic = edit_compile.load_elastic(file, model=qwen()[0])
    given = elastic._given
    assert len(given) == BLOCKS
    for index, tensors in enumerate(given):
        router = Router(elastic.router_config, DIM, DIM)
        router.load_state_dict(tensors)
        generator = torch.Generator().manual_seed(index)
        text, image = (torch.randn(3, n, DIM, generator=generator) for n in (7, 20))
        temb = torch.randn(3, DIM, generator=generator)
        expected = TheirRouter(checkpoint(), index)(text, image, temb)
        torch.testing.assert_close(router([text, image], temb), expected, rtol=1e-4, atol=1e-5)


def test_what_is_loaded(file: Path) -> None:
    model = qwen()[0]
    elastic = edit_compile.load_elastic(str(file), model=model)
    stored = load_file(file)
    assert all(torch.equal(value, stored[key]) for key, value in model.state_dict().items())
    assert elastic.router_config == RouterConfig(hidden=HIDDEN, activation="relu", time_activation="silu")
    assert (elastic.policy, elastic.narrow, elastic.activation) == (POLICY, ("hidden_states",), "quick_gelu")
    assert (POLICY.threshold, POLICY.margin, POLICY.max_reuse, POLICY.warmup_steps) == (0.5, 0.015, 10, 15)
    assert not elastic.training


REFUSED: dict[str, tuple[Callable[[Weights], object], str]] = {
    "a model tensor lacks": (lambda w: w.pop("img_in.bias"), r"lacks img_in\.bias"),
    "a model tensor is unknown": (lambda w: w.update(extra=torch.ones(1)), "unknown extra"),
    "a model tensor is of another shape": (
        lambda w: w.update({"img_in.bias": torch.ones(5)}),
        r"img_in\.bias \[5\] instead of \[48\]",
    ),
    "no routers": (lambda w: [w.pop(key) for key in list(w) if key.startswith("gate_mlps")], "holds no routers"),
    "a router lacks": (
        lambda w: [w.pop(key) for key in list(w) if key.startswith("gate_mlps.0")],
        r"lacks gate_mlps\.0, but has gate_mlps\.1",
    ),
    "a router's tensor lacks": (lambda w: w.pop("gate_mlps.0.out.0.weight"), r"lacks gate_mlps\.0\.out\.0\.weight"),
    "a router's tensor is unknown": (
        lambda w: w.update({"gate_mlps.1.norm.weight": torch.ones(DIM)}),
        r"unknown gate_mlps\.1\.norm\.weight",
    ),
    "a router's tensor is of another shape": (
        lambda w: w.update({"gate_mlps.1.width_head.bias": torch.ones(3)}),
        r"gate_mlps\.1\.width_head\.bias \[3\] instead of \[4\]",
    ),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_a_file_that_does_not_fit_is_refused_and_the_model_left_alone(case: str, tmp_path: Path) -> None:
    harm, message = REFUSED[case]
    weights, model = checkpoint(), qwen()[0]
    harm(weights)
    save_file(weights, tmp_path / "model.safetensors")
    before, shown = {key: value.clone() for key, value in model.state_dict().items()}, repr(model)
    with pytest.raises(ElasticError, match=message):
        edit_compile.load_elastic(tmp_path / "model.safetensors", model=model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert repr(model) == shown


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    for name in ("model.safetensors", "absent.safetensors"):
        with pytest.raises(ElasticError, match=f"{name} cannot be read"):
            edit_compile.load_elastic(tmp_path / name, model=qwen()[0])
    with pytest.raises(ElasticError, match="pass load_elastic"):
        edit_compile.load_elastic(tmp_path / "model.safetensors")


@pytest.fixture(scope="module")
def elastic(file: Path) -> ElasticTransformer:
    model, inputs = qwen()
    return edit_compile.load_elastic(file, model=model, inputs=inputs)


@torch.no_grad()
def test_eager_does_what_their_model_does(elastic: ElasticTransformer) -> None:
    model, blocks = theirs()
    gates: list[Tensor] = []
    for step in range(6):
        check_equal(elastic(**at(step)), model(**at(step)), f"step {step}")
        gates.append(elastic.routing.gate)
    assert 0 < torch.stack(gates).mean() < 1, "some blocks should be skipped for this test to mean anything"
    assert len({share for block in blocks for p, share in block.done if p >= 0.5}) > 1, "and widths should differ"


def test_only_the_images_mlp_is_masked_in_training_too(elastic: ElasticTransformer) -> None:
    assert [[mask.module for mask in block.masks] for block in elastic.layout.blocks] == [["img_mlp.net.2"]] * BLOCKS
    output = elastic(**at(0))  # straight-through, since gradients are enabled
    with torch.no_grad():
        check_equal(output, theirs()[0](**at(0)), "straight-through decisions")
    output.sample.square().mean().backward()
    assert all(float(router.gate.weight.grad.abs().sum()) > 0 for router in elastic.routers)
    assert any(float(router.width.weight.grad.abs().sum()) > 0 for router in elastic.routers)
    elastic.zero_grad()


@pytest.fixture(scope="module")
def compiled(elastic: ElasticTransformer) -> CompiledTransformer:
    made = edit_compile.compile(elastic, inputs=qwen()[1], engine="torch")
    assert isinstance(made, CompiledTransformer)
    return made


@pytest.mark.slow
@torch.no_grad()
def test_compiled_does_what_their_model_does(compiled: CompiledTransformer) -> None:
    model, _ = theirs()
    compiled._reset_stateful_cache()
    for step in range(6):  # all within the warm-up, so that nothing is reused
        check_equal(compiled(**at(step)), model(**at(step)), f"step {step}")
    done = compiled.trace[-1].arrays()
    assert {SKIPPED, COMPUTED} == {*done["done"].tolist()}, "some blocks should be skipped, others not"


@pytest.mark.slow
def test_the_texts_mlp_is_full_at_every_width(compiled: CompiledTransformer) -> None:
    (plan,) = compiled.program.manifest.plans
    rows = zip(*(variant.rows for variant in plan.variants), strict=True)
    moving = {weight for weight, counts in zip(plan.weights, rows, strict=True) if len(set(counts)) > 1}
    assert len(moving) == 3
    assert all("img_mlp" in weight for weight in moving)


@pytest.mark.slow
@torch.no_grad()
def test_nothing_is_reused_before_the_fifteenth_step(compiled: CompiledTransformer) -> None:
    """Every gate just above the threshold: reused as soon as allowed, and computed anew after ten times."""
    routers = compiled.program.routers
    held = {key: value.clone() for key, value in routers.items()}
    try:
        for key, value in routers.items():
            if ".gate." in key:
                value.fill_(0.03 if key.endswith("bias") else 0.0)  # p = 0.5075
        program = CompiledTransformer(compiled.program, "torch", compiled.policy)
        for step in range(28):
            program(**at(step))
        done = program.trace[-1].arrays()
    finally:
        for key, value in held.items():
            routers[key].copy_(value)
    reused = {int(step) for step, what in zip(done["step"], done["done"], strict=True) if what == REUSED}
    assert reused == {*range(15, 25), 26, 27}
    assert np.isin(done["done"], (REUSED, COMPUTED)).all()


@pytest.mark.slow
def test_what_was_loaded_survives_saving(
    elastic: ElasticTransformer, compiled: CompiledTransformer, tmp_path: Path
) -> None:
    elastic.save_pretrained(tmp_path / "elastic")
    again = edit_compile.load_elastic(tmp_path / "elastic")
    assert (again.policy, again.narrow, again.activation) == (POLICY, NARROW, "quick_gelu")
    assert again.layout == elastic.layout
    with torch.no_grad():
        check_equal(again(**at(0)), elastic(**at(0)), "the model read again")
    compiled.save(tmp_path / "bundle")
    assert edit_compile.load(tmp_path / "bundle", engine="torch").policy == POLICY
