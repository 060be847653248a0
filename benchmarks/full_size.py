"""What would be compiled of FLUX.1-dev and Qwen-Image at their own sizes: python -m benchmarks.full_size.

Neither weights nor a GPU: the models are built on the meta device from their published configurations, and dry-run at a
1024 x 1024 image. Each runs in a process of its own. Prints the reports, writes results/full_size.json.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "full_size.json"
SIDE = 64  # tokens along a side of a 1024 x 1024 image: the VAE divides by 8, patches by 2


@dataclass(frozen=True)
class FullSize:
    """A model of diffusers at its published size: `config` where it is not the class's default, and a call's inputs."""

    kind: str
    config: Mapping[str, Any]
    inputs: Callable[[], dict[str, Any]]

    def build(self) -> nn.Module:
        """The model on the meta device."""
        import diffusers

        with torch.device("meta"):
            model: nn.Module = getattr(diffusers, self.kind)(**self.config)
        return model.eval()


def _flux() -> dict[str, Any]:
    image, text = SIDE**2, 512
    return {
        "hidden_states": _bare(1, image, 64),
        "encoder_hidden_states": _bare(1, text, 4096),
        "pooled_projections": _bare(1, 768),
        "timestep": _bare(1),
        "guidance": _bare(1),
        "img_ids": _bare(image, 3),
        "txt_ids": _bare(text, 3),
    }


def _qwen_image() -> dict[str, Any]:
    image, text = SIDE**2, 256
    return {
        "hidden_states": _bare(1, image, 64),
        "encoder_hidden_states": _bare(1, text, 3584),
        "encoder_hidden_states_mask": _bare(1, text, dtype=torch.bool),
        "timestep": _bare(1),
        "img_shapes": [[(1, SIDE, SIDE)]],
    }


def _bare(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


MODELS = {
    "Qwen-Image": FullSize("QwenImageTransformer2DModel", {}, _qwen_image),
    "FLUX.1-dev": FullSize("FluxTransformer2DModel", {"guidance_embeds": True}, _flux),
}


def measure(name: str) -> dict[str, Any]:
    """The dry run of one of MODELS in a fresh process: its figures, the report as text, seconds and peak memory."""
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.full_size", name],
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode:
        raise RuntimeError(f"the dry run of {name} failed:\n{finished.stderr}")
    measured: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return measured


def dry_run(name: str) -> dict[str, Any]:
    """See `measure`; in this process. Seconds include building the model, bytes the libraries."""
    import edit_compile

    started, worked = time.perf_counter(), time.process_time()
    model = MODELS[name].build()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    report = edit_compile.compile(edit_compile.elasticize(model), inputs=MODELS[name].inputs(), dry_run=True)
    return {
        "name": name,
        "parameters": parameters,
        "blocks": report.blocks,
        "plans": [asdict(row) for row in report.plans],
        "router_parameters": report.router_parameters,
        "router_flops": report.router_flops,
        "standalone": report.standalone,
        "refused": [[where, refusal.where, refusal.reason] for where, refusal in report.refused],
        "unchecked": list(report.unchecked),
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time() - worked,
        "peak_bytes": _peak_bytes(),
        "text": str(report),
    }


def _peak_bytes() -> int:
    """Largest resident size of this process; unlike getrusage's, it forgets the process that started this one."""
    found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    rows = []
    for name in MODELS:
        row = measure(name)
        print(row.pop("text"))
        print(
            f"{name}: {row['parameters'] / 1e9:.1f} B parameters, {row['seconds']:.0f} s "
            f"({row['processor_seconds']:.0f} s of one processor), {row['peak_bytes'] / 2**30:.2f} GiB at most\n"
        )
        rows.append(row)
    RESULTS.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")
    print(f"wrote {RESULTS.name}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(dry_run(sys.argv[1])))
    else:
        main()
