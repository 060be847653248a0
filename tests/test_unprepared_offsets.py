"""Offsets in the tokens of a whole batch, in calls in which they do not part its samples where its rows end."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import edit_compile
from runtime.base.errors import InputError
from tests.emulator import Emulator
from tests.unprepared import DIM, UNTRAINED, Net, Packed, close, guarded, inputs

pytestmark = [*UNTRAINED, pytest.mark.filterwarnings("ignore:.*has no routers:UserWarning")]
TOKENS = 9
REFUSED = r"block blocks\.0: argument 'cu' does not part the samples after every {} tokens"


class Segmented(Packed):
    """Takes offsets of any kind, sorted or not."""

    def segments(self, cu: Tensor, count: int) -> Tensor:
        return (torch.arange(count)[:, None] >= cu[None, 1:]).sum(1)


class Lengths(Net):
    """Takes the lengths of its samples; attention goes by where they end."""

    block = Segmented

    def offsets(self, lengths: Tensor, shift: Tensor) -> Tensor:
        return F.pad(lengths.cumsum(0), (1, 0)) + shift

    def forward(self, x: Tensor, t: Tensor, lengths: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        y, c = self.start(x, t)
        cu = self.offsets(lengths, shift)
        for block in self.blocks:
            y = block(y, c, cu)
        return self.head(y)


class Hosted(Lengths):
    """Looks at a number, so that its own Python runs around its blocks."""

    def forward(self, x: Tensor, t: Tensor, lengths: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, t, lengths, shift) * (2 if float(x.sum()) > 1e6 else 1)


class InRows(Lengths):
    """Gives its blocks the tokens of all samples as rows."""

    class block(Segmented):
        def forward(self, x: Tensor, c: Tensor, cu: Tensor) -> Tensor:
            return super().forward(x.unflatten(0, (len(c), -1)), c, cu).flatten(0, 1)

    def forward(self, x: Tensor, t: Tensor, lengths: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        y, c = self.start(x, t)
        y, cu = y.flatten(0, 1), self.offsets(lengths, shift)
        for block in self.blocks:
            y = block(y, c, cu)
        return self.head(y).view_as(x)


class Joint(Lengths):
    """Offsets count the tokens of two streams."""

    class block(Segmented):
        def forward(self, x: Tensor, text: Tensor, c: Tensor, cu: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            whole = super().forward(torch.cat([x, text], 1), c, cu)
            return whole[:, : x.shape[1]], whole[:, x.shape[1] :]

    def forward(self, x: Tensor, t: Tensor, lengths: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        y, c = self.start(x, t)
        text, cu = y[:, :4] * 2, self.offsets(lengths, shift)
        for block in self.blocks:
            y, text = block(y, text, c, cu)
        return self.head(y)


def of(model: type, *lengths: int, shift: int = 0) -> dict[str, Any]:
    more = 4 if model is Joint else 0
    lengths = tuple(length + more for length in lengths)
    return inputs(len(lengths)) | {"lengths": torch.tensor(lengths), "shift": torch.tensor(shift)}


MODELS = [Lengths, Hosted, InRows, Joint]


@torch.no_grad()
@pytest.mark.parametrize("make", MODELS)
def test_offsets_that_part_samples_elsewhere_are_refused(make: type, tmp_path: Path) -> None:
    model = make().eval()
    compiled = edit_compile.compile(model, inputs=of(make, 9, 9), engine="torch")
    ways = [compiled]
    hosted = compiled.program.manifest.glues[0].file is None
    assert hosted == (make is Hosted)
    if not hosted:
        compiled.save(tmp_path / "x.edit")
        ways.append(edit_compile.load(tmp_path / "x.edit", engine="torch"))
    refused = REFUSED.format(13 if make is Joint else 9)
    for one in ways:
        for good in (of(make, 9, 9), of(make, 9), of(make, 9, 9, 9)):
            close(one(**good), model(**good))
        for bad in (
            of(make, 9, 9, shift=3),
            of(make, 7, 11),
            of(make, 9, 7),
            of(make, 7, 7),
            of(make, 10, 10),
            of(make, 9, 9, shift=-1),
            of(make, 8),
        ):
            with pytest.raises(InputError, match=refused):
                one(**bad)
        close(one(**of(make, 9, 9)), model(**of(make, 9, 9)))


class Segments(Lengths):
    """Several segments for each sample, of which some may be empty or fall."""

    def offsets(self, lengths: Tensor, shift: Tensor) -> Tensor:
        start = torch.arange(len(lengths)) * TOKENS
        return F.pad(torch.stack([start + lengths + shift, start + TOKENS], 1).flatten(), (1, 0))


@torch.no_grad()
def test_segments_within_a_sample_may_end_anywhere_but_rise() -> None:
    model = Segments()
    compiled = guarded(model, of(Segments, 5, 7), of(Segments, 0, 9), of(Segments, 9, 1, 4))
    with pytest.raises(InputError, match=REFUSED.format(9)):
        compiled(**of(Segments, 5, 10))
    with pytest.raises(InputError, match=REFUSED.format(9)):
        compiled(**of(Segments, 5, 7, shift=-6))


class Halves(Lengths):
    """Offsets in something else than tokens."""

    class block(Segmented):
        def forward(self, x: Tensor, c: Tensor, cu: Tensor) -> Tensor:
            return super().forward(x, c, cu // 2) + (cu.diff().view(len(x), -1)[:, :1, None] / DIM)

    def offsets(self, lengths: Tensor, shift: Tensor) -> Tensor:
        return super().offsets(2 * lengths, shift)


def test_offsets_of_which_it_is_not_known_what_they_count_are_refused() -> None:
    report = edit_compile.compile(Halves().eval(), inputs=of(Halves, 9, 9), dry_run=True)
    assert report.blocks == 0
    reason = report.refused[0][1].reason
    assert "argument 'cu' holds offsets, but in no tokens that the block is given" in reason


@torch.no_grad()
def test_one_check_serves_all_blocks() -> None:
    compiled = edit_compile.compile(Lengths().eval(), inputs=of(Lengths, 9, 9), engine="torch")
    (glue,) = compiled.program.manifest.glues
    data = compiled.program.files[glue.file]
    assert data.count(b"torch.ops.edit_compile.checked.default") == 1


@torch.no_grad()
def test_a_step_with_a_check_is_the_hosts(recorder: Emulator, caplog: pytest.LogCaptureFixture) -> None:
    model = Lengths().eval()
    compiled = edit_compile.compile(model, inputs=of(Lengths, 9, 9), engine="torch", dispatch="device")
    with caplog.at_level(logging.WARNING):
        close(compiled(**of(Lengths, 9, 9)), model(**of(Lengths, 9, 9)))
    assert "decisions are taken on the host: a step could not be recorded: values of the inputs" in caplog.text
    with pytest.raises(InputError, match=REFUSED.format(9)):
        compiled(**of(Lengths, 9, 9, shift=3))
