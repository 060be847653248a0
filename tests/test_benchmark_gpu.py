"""`benchmarks.gpu` as far as a CPU goes: every piece on toys, failures recorded, CUDA stood in for."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import gpu, gpu_pieces, gpu_waits, gpu_worker
from benchmarks.configurations import FLUX, FULL, QWEN_IMAGE, SMALL, Place
from benchmarks.gpu_case import Case, Settings, missing
from benchmarks.gpu_fit import needed, too_large
from benchmarks.gpu_table import markdown, table_of
from runtime.bundle.spec import plan_file

CPU = Place(torch.device("cpu"), torch.float32)
CUDA = Place(torch.device("cuda"), torch.bfloat16)
FAST = [name for name in gpu_pieces.PIECES if name not in ("inductor", "bundle")]


def record(model: str, pieces: list[str], engines: list[str]) -> gpu.Record:
    given = ["--device", "cpu", "--small", "--models", model, "--steps", "2", "--repeats", "1", "--output", "elsewhere"]
    return gpu.record_of(model, gpu.parse([*given, "--pieces", *pieces, "--engines", *engines]))


@pytest.fixture(scope="module")
def case() -> Case:
    return Case(SMALL["qwen-image"], CPU, Settings(steps=2, repeats=1))


@pytest.fixture
def on_cuda(case: Case, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    """The case as if it were on a GPU, whose counters are stood in for."""
    counters: dict[str, Callable[..., Any]] = {
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 150,
        "reset_peak_memory_stats": lambda: None,
        "mem_get_info": lambda *_: (60, 100),
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: None,
    }
    for name, stand_in in counters.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    case.place = CUDA
    yield case
    case.place = CPU


def test_every_piece_runs_on_a_toy_and_what_needs_cuda_says_so(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_worker, "Case", lambda *_: case)
    found = record("qwen-image", FAST, ["torch", "tensorrt"])
    seen: list[str] = []
    gpu_worker.work(found, lambda told: seen.append(json.dumps(told)))
    done = found["engines"]["torch"]
    assert set(done) == set(FAST)
    assert [name for name, result in done.items() if "error" in result] == []
    assert done["speed"]["steps"] == 2 and done["speed"]["flop_limit"] > 1
    assert [one["width"] for one in done["parity"]] == [0.25, 0.5, 0.75, 1.0]
    assert all(one["relative"] <= one["allowed"] for one in done["parity"])
    assert done["builds"]["engines"] == 4 and done["builds"]["blocks"] == 2
    assert done["dispatch"]["device"] == done["memory"]["peak"] == gpu_pieces.NEEDS_CUDA
    assert done["dispatch"]["host"]["difference_from_host"] == 0
    assert all("needs CUDA" in result["unavailable"] for result in found["engines"]["tensorrt"].values())
    assert len(seen) > 2 * len(FAST)
    assert any('"begun": true' in text for text in seen)
    table_of(found, found["machine"])


@pytest.mark.slow
def test_flux_runs_too() -> None:
    found = record("flux", ["speed", "parity"], ["torch"])
    gpu_worker.work(found, lambda _: None)
    assert found["prepare"]["blocks"] == 3 and found["prepare"]["plans"] == 2
    assert all(one["relative"] <= one["allowed"] for one in found["engines"]["torch"]["parity"])


def test_both_models_have_the_preset_of_the_paper() -> None:
    assert (FLUX.gate, FLUX.width, FLUX.steps) == (0.5, 0.6, 28)
    assert (QWEN_IMAGE.gate, QWEN_IMAGE.width, QWEN_IMAGE.steps) == (0.6, 0.65, 30)


def test_the_case_of_qwen_image_decides_at_its_budget(case: Case) -> None:
    computed = case.budget.table[case.budget.table > 0]
    assert case.budget.routed and case.budget.table.shape == (2, 2)
    assert len(computed) == round(0.6 * 4)


def test_what_is_measured_as_eager_is_the_bare_model(case: Case) -> None:
    hooked = [name for name, module in case.eager.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    assert hooked == []
    assert case.program.routers


def test_a_program_has_the_files_of_both_engines_that_verify_compares(case: Case) -> None:
    for plan in case.program.manifest.plans:
        for variant in range(len(plan.variants)):
            assert {plan_file(plan, variant, suffix) for suffix in ("pt2", "onnx")} <= set(case.program.files)


def test_a_piece_that_fails_is_recorded_and_the_others_run(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    def broken(case: Case, engine: str) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(gpu_worker, "Case", lambda *_: case)
    monkeypatch.setitem(gpu_worker.PIECES, "speed", broken)
    found = record("qwen-image", ["builds", "speed", "memory"], ["torch"])
    gpu_worker.work(found, lambda _: None)
    done = found["engines"]["torch"]
    assert done["speed"]["error"] == "RuntimeError: out of luck"
    assert "test_benchmark_gpu.py" in done["speed"]["where"]
    assert "ratio" in done["memory"] and "seconds" in done["builds"]


def test_an_engine_that_cannot_be_had_is_tried_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def make(*_: object, **__: object) -> None:
        tried.append(1)
        raise gpu_pieces.Unavailable("no such library")

    monkeypatch.setattr("benchmarks.gpu_case.CompiledTransformer", make)
    for _ in range(2):
        with pytest.raises(gpu_pieces.Unavailable, match="no such library"):
            case.load("onnxruntime")
    assert len(tried) == 1
    case._failed.clear()


def test_which_engines_are_for_which_device() -> None:
    assert "needs CUDA" in str(missing("tensorrt", CPU.device))
    assert "runs on the CPU" in str(missing("onnxruntime", CUDA.device))
    assert "has no engine 'abacus'" in str(missing("abacus", CUDA.device))
    assert missing("torch", CPU.device) is missing("tensorrt", CUDA.device) is None


def test_on_a_gpu_memory_is_counted(on_cuda: Case) -> None:
    found = gpu_pieces.memory(on_cuda, "torch")
    assert found["peak"]["eager"] == 50 and set(found["peak"]["at_width"].values()) == {50}
    assert gpu_pieces.builds(on_cuda, "torch")["device_bytes"] == 0


def test_waits_of_the_host_are_counted_twice_over(on_cuda: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def waiting() -> None:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
        warnings.warn("Synchronization debug mode is a prototype", UserWarning, stacklevel=1)

    assert gpu_waits.host_waits(waiting, steps=2) == {"per_step": 1.5, "counted": {}, "warned": 3}

    def event(name: str, start: int, end: int = 0, device: DeviceType = DeviceType.CPU) -> SimpleNamespace:
        return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=start, end=end))

    region = gpu_waits._REGION
    events = [event(region, 0, 90, DeviceType.CUDA), event(region, 10, 20), event("cudaLaunchKernel", 12)]
    waits = [event("cudaEventSynchronize", at) for at in (11, 15)] + [event("cudaDeviceSynchronize", 25)]
    assert gpu_waits.waits_within([*events, *waits]) == {"cudaEventSynchronize": 2}


def test_on_a_gpu_both_ways_to_decide_are_compared(on_cuda: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda.on("torch")
    other = on_cuda.load("torch")
    other._session._note = "this GPU has no conditional nodes"
    monkeypatch.setattr(on_cuda, "load", lambda engine, dispatch="host": other)
    found = gpu_pieces.dispatch(on_cuda, "torch")
    assert found["device"]["difference_from_host"] == 0
    assert found["device"]["host_waits"]["per_step"] == 0
    assert found["device"]["note"] == "this GPU has no conditional nodes"


def test_a_model_that_does_not_fit_is_skipped_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (78 << 30, 80 << 30))
    told = too_large(QWEN_IMAGE, CUDA)
    assert told is not None and "88 GiB" in str(told["skipped"]) and "78 of 80 GiB" in str(told["skipped"])
    assert needed(QWEN_IMAGE, CUDA).eager == told["needed_bytes"]["eager"] > 40e9  # type: ignore[index]
    assert too_large(FLUX, CUDA) is None and too_large(QWEN_IMAGE.shallow(10), CUDA) is None


# A worker that measures the first piece, dies in the second, and measures the third when it is started again.
WORKER = """
import json, os, sys, time
path = sys.argv[1]
def save(record):
    with open(path + "~", "w") as file:
        json.dump(record, file)
    os.replace(path + "~", path)
record = json.load(open(path))
record["prepare"] = {"blocks": 1}
for name, found in record["engines"]["torch"].items():
    if found:
        continue
    record["engines"]["torch"][name] = {"begun": True}
    save(record)
    if name == "speed":
        os.kill(os.getpid(), 9)
    if name == "memory":
        time.sleep(float(sys.argv[2]) if len(sys.argv) > 2 else 0)
    record["engines"]["torch"][name] = {"done": True}
    save(record)
"""


@pytest.fixture
def worker(tmp_path: Path) -> list[str]:
    (tmp_path / "worker.py").write_text(WORKER)
    return [sys.executable, str(tmp_path / "worker.py")]


def test_a_process_that_dies_is_marked_and_the_rest_goes_on_in_a_new_one(worker: list[str]) -> None:
    noted: list[str] = []
    asked = record("flux", ["builds", "speed", "memory"], ["torch"])
    found = gpu.measure(asked, time.monotonic() + 60, lambda told: noted.append(json.dumps(told)), worker)
    done = found["engines"]["torch"]
    assert done["builds"] == done["memory"] == {"done": True}
    assert done["speed"] == {"error": "its process ended with signal 9"}
    assert noted[-1] == json.dumps(found)


def test_what_is_cut_off_leaves_what_it_has(worker: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "POLL", 0.05)
    asked = record("flux", ["builds", "memory", "parity"], ["torch"])
    sleeping = ["sh", "-c", f'exec {worker[0]} {worker[1]} "$0" 60']
    seen: list[dict[str, Any]] = []
    found = gpu.measure(asked, time.monotonic() + 2, lambda told: seen.append(told["engines"]["torch"]), sleeping)
    done = found["engines"]["torch"]
    assert done["builds"] == {"done": True}
    assert "used up" in done["memory"]["error"]
    assert "used up" in done["parity"]["skipped"]
    assert any(told["builds"] == {"done": True} and told["memory"] == {"begun": True} for told in seen)


def test_without_a_model_nothing_is_left_to_do() -> None:
    found = record("flux", ["speed"], ["torch"])
    found["prepare"] = {"skipped": "needs 88 GiB"}
    assert not gpu.settle(found, "its process ended with status 0")
    assert found["engines"]["torch"]["speed"] == {"skipped": "there is no compiled model"}


def test_what_cannot_give_figures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="figures of a GPU"):
        gpu.main(["--device", "cpu", "--small"])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="sees no GPU"):
            gpu.main([])
    assert gpu.parse([]).models == list(FULL)
    assert "bundle" not in gpu.parse([]).pieces


def test_the_figures_go_into_a_table_with_their_machine() -> None:
    spread = {"median": 2.5, "low": 2.4, "high": 2.6}
    done = {"speed": {"eager_ms": spread, "compiled_ms": spread, "ratio": spread, "flop_limit": 2.6}, "memory": None}
    found = record("flux", ["speed", "memory"], ["torch", "tensorrt"]) | {"engines": {"torch": done, "tensorrt": {}}}
    large = record("qwen-image", ["speed"], ["torch"]) | {"prepare": {"skipped": "needs about 88 GiB"}}
    machine = {"gpu": "A GPU", "torch": "2.13.0", "cuda": "13.0", "driver": "580.65", "gpu_memory": "79.1 GiB"}
    text = markdown({"machine": machine, "models": [found, large]})
    assert "| FLUX, tiny, float32, torch | 2.5 | 2.5 | 2.50 (2.40 to 2.60) | 2.60 |  |" in text
    assert "A GPU, torch 2.13.0, CUDA 13.0, driver 580.65, 79.1 GiB" in text
    assert "2 steps (28 in the paper)" in text
    assert "Qwen-Image, tiny: needs about 88 GiB." in text


@pytest.mark.slow
def test_the_command_measures_everything_on_the_engines_of_a_cpu(tmp_path: Path) -> None:
    given = ["--device", "cpu", "--small", "--steps", "2", "--repeats", "1", "--engines", "torch", "onnxruntime"]
    gpu.main([*given, "--pieces", *gpu_pieces.PIECES, "--minutes", "20", "--output", str(tmp_path)])
    found = json.loads((tmp_path / "gpu.json").read_text())["models"]
    assert [one["model"] for one in found] == ["flux", "qwen-image"]
    for one in found:
        for engine, done in one["engines"].items():
            assert [name for name, result in done.items() if "error" in result or "skipped" in result] == []
            assert done["inductor"]["ratio"] > 0
            assert ("unavailable" in done["bundle"]) == (engine != "torch")
            assert done["bundle"].get("difference", 0) <= 1e-5
            assert all(part["relative"] <= part["allowed"] for part in done["parity"])
