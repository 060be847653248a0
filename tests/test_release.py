"""The authors' checkpoint: its routers as they wrote them, compiled as eager runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import edit_compile
from edit_compile import ElasticTransformer
from edit_compile.elastic.release import NARROW, POLICY
from passes.program.check import check_equal
from runtime.bundle.spec import RouterConfig
from runtime.face.transformer import CompiledTransformer
from runtime.requests.trace import COMPUTED, REUSED, SKIPPED
from runtime.routing.router import Router
from tests.released import BLOCKS, DIM, HIDDEN, Weights, checkpoint, qwen, written


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("release"))


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
    for step in range(6):  # all within the warm-up, so that nothing is reused
        with compiled.request("one"):
            output = compiled(**at(step))
        check_equal(output, model(**at(step)), f"step {step}")
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
        with program.request("one"):
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
