"""Batches held in other ways: guidance inside the forward, offsets in the tokens of all samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import edit_compile
from tests.unprepared import UNTRAINED, Block, Net, Packed, close, dry, guarded, inputs, masked, reasons

pytestmark = UNTRAINED


class Masked(Block):
    def forward(self, x: Tensor, c: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        kept = None if mask is None else mask.bool()[:, None, None]
        x = x + self.attend(x + c[:, None], kept)
        return x + self.mlp(x)


class Guided(Net):
    """Doubles its batch: with the mask, and without any of it that differs between samples."""

    block = Masked

    def forward(self, x: Tensor, t: Tensor, mask: Tensor | None = None, scale: float = 3.0) -> Tensor:  # type: ignore[override]
        y, c = self.start(torch.cat([x, 0 * x]), torch.cat([t, t]))
        mask = None if mask is None else torch.cat([mask, mask])
        for block in self.blocks:
            y = block(y, c, mask)
        cond, free = self.head(y).chunk(2)
        return free + scale * (cond - free)


class GuidedByText(Guided):
    """Takes what it is guided by for both halves."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
        y, c = self.start(torch.cat([x, x]), torch.cat([t, t]))
        y = y + self.embed(text).mean(1, keepdim=True)
        for block in self.blocks:
            y = block(y, c)
        cond, free = self.head(y).chunk(2)
        return free + 3.0 * (cond - free)


@pytest.mark.parametrize("batch", [1, 2])
def test_guidance_inside_the_forward_is_seen_per_sample(batch: int, tmp_path: Path) -> None:
    model = Guided()
    compiled = guarded(model, inputs(batch), inputs(3), inputs(1, seed=7))
    compiled.save(tmp_path / "bundle")
    close(edit_compile.load(tmp_path / "bundle", engine="torch")(**inputs(3)), model(**inputs(3)))


@pytest.mark.parametrize("lengths", [(9, 9), (7, 5)])
def test_a_mask_that_leaves_the_order_open_goes_with_the_tokens(lengths: tuple[int, int]) -> None:
    guarded(Guided(), masked(2, *lengths), masked(2, 5, 9), masked(2, 9, 3))


def test_arguments_given_for_both_halves_are_doubled_in_halves() -> None:
    given = inputs(2) | {"text": torch.randn(4, 5, 4, generator=torch.Generator().manual_seed(5))}
    guarded(GuidedByText(), given)


@torch.no_grad()
def test_samples_go_ways_of_their_own() -> None:
    """Rows of one sample are skipped together, where they lie apart."""
    model = Guided().eval()
    elastic = edit_compile.elasticize(model, inputs(2)).eval()
    for router in elastic.routers:  # a gate that tells the samples apart
        router.gate.weight.copy_(torch.randn(router.gate.weight.shape, generator=torch.Generator().manual_seed(1)))
        router.gate.bias.zero_()
    compiled = edit_compile.compile(elastic, inputs=inputs(2), engine="torch")
    gates = set()
    for seed in range(6):
        close(compiled(**inputs(3, seed=seed)), elastic(**inputs(3, seed=seed)))
        assert elastic.routing is not None
        gates |= {tuple(row) for row in elastic.routing.gate.T.tolist()}
    assert any(len(set(gate)) == 2 for gate in gates), "no call in which samples differ"


class Video(Net):
    block = Packed

    def offsets(self, used: Tensor, length: int) -> Tensor:
        start = torch.arange(len(used)) * length
        ends = torch.stack([start + used, start + length], 1).flatten()
        return F.pad(ends, (1, 0)).to(torch.int32)

    def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        y, c = self.start(x, t)
        cu = self.offsets(mask.sum(1), mask.shape[1])
        for block in self.blocks:
            y = block(y, c, cu)
        return self.head(y)


class OfSamples(Video):
    """One segment per sample."""

    def offsets(self, used: Tensor, length: int) -> Tensor:
        return torch.arange(len(used) + 1) * length


@pytest.mark.parametrize("make", [Video, OfSamples])
@pytest.mark.parametrize("batch", [1, 2])
def test_offsets_in_the_tokens_of_all_are_seen_per_sample(make: Any, batch: int) -> None:
    guarded(make(), masked(batch, 7, 4), masked(batch, 2, 9), masked(3, 4, 8))


@torch.no_grad()
def test_offsets_follow_where_samples_are_left_out() -> None:
    model = Video().eval()
    elastic = edit_compile.elasticize(model, masked(3, 7, 4, 2)).eval()
    for router in elastic.routers:
        router.gate.weight.copy_(torch.randn(router.gate.weight.shape, generator=torch.Generator().manual_seed(1)))
        router.gate.bias.zero_()
    compiled = edit_compile.compile(elastic, inputs=masked(3, 7, 4, 2), engine="torch")
    for seed in range(4):
        given = masked(3, 2, 9, 5) | inputs(3, seed=seed)
        close(compiled(**given), elastic(**given))


class Starts(Video):
    """Absolute places that say nothing of a sample alone."""

    class block(Block):
        def forward(self, x: Tensor, c: Tensor, cu: Tensor) -> Tensor:  # type: ignore[override]
            return Block.forward(self, x, c, x + x.flatten(0, 1)[cu][:, None])

    def offsets(self, used: Tensor, length: int) -> Tensor:
        return torch.arange(len(used)) * length


def test_places_in_the_batch_that_are_no_offsets_are_refused() -> None:
    for batch in (1, 2):
        assert "on a single row" in reasons(Starts(), masked(batch, 7))[0]


class Mixing(Guided):
    """The halves of a batch that mix their samples."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
        y, c = self.start(torch.cat([x, x.flip(0)]), torch.cat([t, t]))
        for block in self.blocks:
            y = block(y, c)
        cond, free = self.head(y).chunk(2)
        return cond + free


def test_halves_that_mix_samples_are_refused() -> None:
    with pytest.raises(edit_compile.EditError, match="rows of one sample changed"):
        dry(Mixing(), inputs(2))


class Listed(Net):
    class block(Block):
        def forward(self, x: Tensor, c: Tensor, lengths: list[int]) -> Tensor:  # type: ignore[override]
            return super().forward(x, c)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y, c = self.start(x, t)
        for block in self.blocks:
            y = block(y, c, [y.shape[1]] * len(y))
        return self.head(y)


def test_a_list_of_one_entry_per_sample_is_refused_by_its_name() -> None:
    for batch in (1, 2):
        (reason, _) = reasons(Listed(), inputs(batch))
        assert "argument 'lengths' has other entries there (one for each sample? pass a tensor instead)" in reason
