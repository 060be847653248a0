"""From a plan's ONNX to an engine: parsed in memory, strongly typed, with its weights as inputs or as constants.

Weights become constants after parsing: each layer that reads the input w is given a constant of w's values instead,
and the input is removed. So no ONNX library is needed, and a graph's own file stays as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from runtime.base.errors import EngineError
from runtime.engines.tensorrt.library import Library, Target

if TYPE_CHECKING:
    import tensorrt as trt

    from runtime.engines.tensorrt.jobs import Profile

Report = Callable[[str, int, int], None]
"""Called with a phase of a build, the steps it has done, and how many it has."""

_TYPES = {
    "torch.float32": "FLOAT",
    "torch.float16": "HALF",
    "torch.bfloat16": "BF16",
    "torch.int64": "INT64",
    "torch.int32": "INT32",
    "torch.uint8": "UINT8",
    "torch.int8": "INT8",
    "torch.bool": "BOOL",
}

log = logging.getLogger(__name__)


def build(
    library: Library,
    target: Target,
    onnx: bytes,
    profiles: Sequence[Profile],
    *,
    constants: Mapping[str, Tensor] | None = None,
    timings: bytes = b"",
    report: Report | None = None,
) -> tuple[bytes, bytes]:
    """An engine of `onnx`, and the timing cache after it was built (empty where the library keeps none).

    `constants` are the values of inputs that become part of the engine. `timings` is an earlier build's timing cache.
    Products in float32 are computed in float32, not in TF32. EngineError, with the library's own words, where it fails.
    """
    trt = library.api
    told: list[str] = []
    logger = make_logger(library, told)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx):
        raise _failed(library, target, "does not understand the plan", _parse_errors(parser) or told)
    held = _fix(library, network, constants or {})
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    for profile in profiles:
        config.add_optimization_profile(_profile(builder, network, profile))
    if library.ahead_of_time:
        config.num_compute_capabilities = 1
        config.set_compute_capability(_capability(library, target), 0)
    else:
        config.set_timing_cache(config.create_timing_cache(timings), ignore_mismatch=False)
    if report is not None:
        config.progress_monitor = _monitor(library, report)
    engine = builder.build_serialized_network(network, config)
    del held
    if engine is None:
        raise _failed(library, target, "cannot build the plan", told)
    cache = b"" if library.ahead_of_time else bytes(config.get_timing_cache().serialize())
    return bytes(engine), cache


def make_logger(library: Library, told: list[str]) -> trt.ILogger:
    """A logger that writes to `logging`, and keeps in `told` what went wrong."""
    trt = library.api
    levels = {
        trt.ILogger.Severity.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.Severity.ERROR: logging.ERROR,
        trt.ILogger.Severity.WARNING: logging.INFO,
    }

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            if level == logging.ERROR:
                told.append(msg)
            log.log(min(level, logging.INFO), "%s: %s", library.name, msg)

    return Logger()


def _fix(library: Library, network: trt.INetworkDefinition, constants: Mapping[str, Tensor]) -> list[Tensor]:
    """Make inputs of `network` constant; the result has to live until the engine is built."""
    trt = library.api
    held, by_name = [], {}
    for name, value in constants.items():
        if str(value.dtype) not in _TYPES:
            raise EngineError(f"weight {name} is {value.dtype}, which {library.name} does not know")
        own = value.detach().cpu().contiguous()
        weights = trt.Weights(getattr(trt.DataType, _TYPES[str(value.dtype)]), own.data_ptr(), own.numel())
        layer = network.add_constant(tuple(own.shape), weights)
        held.append(own)
        by_name[name] = layer.get_output(0)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        for position in range(layer.num_inputs):
            taken = layer.get_input(position)
            if taken is not None and taken.is_network_input and taken.name in by_name:
                layer.set_input(position, by_name[taken.name])
    for index in reversed(range(network.num_inputs)):
        given = network.get_input(index)
        if given.name in by_name:
            network.remove_tensor(given)
    return held


def _parse_errors(parser: trt.OnnxParser) -> list[str]:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return [f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors]


def _profile(builder: trt.Builder, network: trt.INetworkDefinition, ranges: Profile) -> trt.IOptimizationProfile:
    profile = builder.create_optimization_profile()
    there = {network.get_input(index).name for index in range(network.num_inputs)}
    for one in ranges:
        if one.name in there:  # an input that the plan does not use may be gone from its file
            profile.set_shape(one.name, min=one.least, opt=one.usual, max=one.most)
    return profile


def _capability(library: Library, target: Target) -> trt.ComputeCapability:
    return getattr(library.api.ComputeCapability, target.name.replace("sm_", "SM"))


def _monitor(library: Library, report: Report) -> trt.IProgressMonitor:
    trt = library.api
    steps: dict[str, int] = {}

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            steps[phase_name] = num_steps
            report(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            report(phase_name, step + 1, steps.get(phase_name, step + 1))
            return True

        def phase_finish(self, phase_name: str) -> None:
            done = steps.pop(phase_name, 1)
            report(phase_name, done, done)

    return Monitor()


def _failed(library: Library, target: Target, what: str, told: Sequence[str]) -> EngineError:
    reasons = "; ".join(dict.fromkeys(told)) or "it gives no reason"
    return EngineError(f"{library.name} {library.version} {what} for {target.name}: {reasons}")
