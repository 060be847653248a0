"""The oracle itself, where the answer is known without any algorithm."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tests import programs
from tests.oracle import Oracle

KINDS = ("double", "single")


def oracle(threshold: float, margin: float = 0.0, max_reuse: int = 0) -> tuple[Oracle, dict[str, torch.Tensor]]:
    program = programs.make(KINDS)
    return Oracle(KINDS, program.weights, program.routers, programs.WIDTHS, threshold, margin, max_reuse), dict(
        program.weights
    )


def test_gates_all_shut_leave_the_glue_alone() -> None:
    shut, weights = oracle(threshold=1.1)
    given = programs.inputs(2)
    out = shut("c", 0, given["hidden_states"], given["encoder_hidden_states"], given["timestep"])
    torch.testing.assert_close(out, given["hidden_states"] @ weights["glue.into"] @ weights["glue.out"])


def test_gates_all_open_at_full_width_are_the_dense_model() -> None:
    opened, weights = oracle(threshold=-0.1)
    opened.widths = (1.0,) * 4
    given = programs.inputs(2)
    out = opened("c", 0, given["hidden_states"], given["encoder_hidden_states"], given["timestep"])
    hidden, text = given["hidden_states"] @ weights["glue.into"], given["encoder_hidden_states"]
    time = torch.sin(given["timestep"][:, None] * weights["glue.timing"])
    table = torch.arange(programs.IMAGE * programs.D).float().reshape(programs.IMAGE, programs.D) * 0.01
    own = [weights[f"blocks.0.{name}"] for name in ("up", "bias", "down", "mix")]
    hidden, text = programs.Double()(*own, hidden, text, time, table)
    hidden = hidden + F.relu(hidden @ weights["blocks.1.up"].t()) @ weights["blocks.1.down"]
    torch.testing.assert_close(out, hidden @ weights["glue.out"])


def test_a_wide_margin_reuses_up_to_the_limit() -> None:
    reusing, _ = oracle(threshold=0.0, margin=1.0, max_reuse=2)
    for step in range(5):
        given = programs.inputs(1, seed=step)
        reusing("c", step, given["hidden_states"], given["encoder_hidden_states"], given["timestep"])
    done = [what for _, _, block, _, what, _ in reusing.log if block == 0]
    assert done == ["compute", "reuse", "reuse", "compute", "reuse"]
