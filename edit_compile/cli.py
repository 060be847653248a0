"""`edit-compile train | record | compile | tune | build | inspect | verify | bench | plot`: the API as commands.

Heavy imports wait inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as missing:
    raise SystemExit(f"edit-compile needs {missing.name}: pip install '.[cli]'") from None

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Elastic diffusion transformers, compiled.", rich_markup_mode=None
)
console = Console()
errors = Console(stderr=True)

OURS = ("edit_compile", "passes", "runtime")

Bundle = Annotated[Path, typer.Argument(help="folder of a compiled bundle")]
Model = Annotated[str, typer.Argument(help="elastic folder, saved diffusers model, or path/to/file.py:ClassName")]
ModelName = typer.Option("--model", help="the model it was compiled from, as for `compile`")
Inputs = Annotated[Path | None, typer.Option(help="safetensors file with the forward's keyword arguments")]
Calls = Annotated[
    Path | None, typer.Option(help="folder of recorded calls (edit-compile record), in the place of --inputs")
]
Steps = Annotated[int | None, typer.Option(min=1, help="default: those recorded, else 28")]
Engine = Annotated[
    str, typer.Option(help="onnxruntime, torch or inductor; on a GPU onnxruntime-cuda, or, once built, tensorrt(-rtx)")
]
EngineOfBundle = Annotated[
    str | None, typer.Option(help="as for `compile`; default: that of the engines in the bundle, else onnxruntime")
]
Preset = Annotated[str | None, typer.Option(help="routing policy by the paper's model, for example flux")]
Budget = Annotated[
    str | None,
    typer.Option("--schedule", help='decisions at random instead of routed: "gate,width", for example .5,.6'),
]


def fail(message: str) -> NoReturn:
    """Say what the user can put right in one line, and end with status 2."""
    errors.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(2)


def plain_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors into one line, those that no message was meant for too; EDIT_COMPILE_DEBUG=1 shows the traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        warnings.filterwarnings(
            "ignore", category=FutureWarning, module="copyreg"
        )  # torch copying its own pytree specs
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except ModuleNotFoundError as error:
            if os.environ.get("EDIT_COMPILE_DEBUG") or (error.name or "").partition(".")[0] in OURS:
                raise
            fail(f"{error.name} is not installed, which this command needs: pip install '.[compile]' in a checkout")
        except Exception as error:
            if os.environ.get("EDIT_COMPILE_DEBUG"):
                raise
            told = " ".join(str(error).split())
            expected = isinstance(error, _expected())
            fail(told if expected else f"{type(error).__name__}: {told} (EDIT_COMPILE_DEBUG=1 shows where)")

    return wrapped


def _expected() -> tuple[type[Exception], ...]:
    """Errors whose message is meant for the user."""
    from edit_compile.loading import UserError
    from runtime.base.errors import EditError  # those of the passes are of its kind

    return UserError, EditError, ValueError, OSError


@app.command()
@plain_errors
def train(
    task: Annotated[str, typer.Argument(help="path/to/file.py:TaskClass; with --estimate, a model as for compile")],
    settings: Annotated[list[str] | None, typer.Argument(help="fields of TrainConfig as name=value")] = None,
    output: Annotated[Path, typer.Option(help="folder of the run; goes on where it stopped")] = Path("runs/train"),
    estimate: Annotated[
        bool, typer.Option("--estimate", help="say what memory training takes instead; needs no weights")
    ] = False,
    inputs: Annotated[
        Path | None, typer.Option(help="with --estimate: safetensors file with a micro batch of keyword arguments")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="with --estimate: of LoRA")] = 16,
    processes: Annotated[int, typer.Option(min=1, help="with --estimate: devices that shard=true shares over")] = 1,
    dtype: Annotated[str, typer.Option(help="with --estimate: what is computed in")] = "bfloat16",
) -> None:
    """Train a task's model, dense or elastic, or estimate the memory that it takes."""
    from edit_compile.loading import UserError, load_inputs, load_model, load_object, parse_dtype, parse_overrides

    if estimate:
        from edit_compile.training.estimate import estimate_model

        if inputs is None:
            raise UserError("--estimate needs --inputs: a file with keyword arguments of the model's forward")
        if settings:
            raise UserError(f"--estimate takes no settings, but was given {settings[0]!r}")
        precision = parse_dtype(dtype)
        assert precision is not None
        loaded = load_model(task, hollow=True)
        console.print(estimate_model(loaded, load_inputs(inputs), precision, rank=rank, processes=processes))
        return
    from edit_compile.training.train import TrainConfig
    from edit_compile.training.train import train as run

    made = load_object(task)
    config = parse_overrides(TrainConfig, settings or [], output=output)
    console.print(run(made(), config))


@app.command()
@plain_errors
def record(
    pipeline: Annotated[str, typer.Argument(help="folder of a saved diffusers pipeline, or its name on the hub")],
    prompts: Annotated[Path, typer.Option(help="text file with a prompt on each line")],
    output: Annotated[Path, typer.Option(help="folder to record into; goes on where it stopped")],
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    guidance: Annotated[float | None, typer.Option(help="guidance scale")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the first prompt; counted on for the others")] = 0,
    height: Annotated[int | None, typer.Option(min=1, help="in pixels")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="in pixels")] = None,
    limit: Annotated[int, typer.Option(min=1, help="bytes on disk; beyond it every second one is dropped")] = 4 << 30,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: float32")] = None,
    argument: Annotated[
        list[str] | None, typer.Option(help="another of its call, as true_cfg_scale=4 or negative_prompt=blurred")
    ] = None,
) -> None:
    """Record the calls that a pipeline's transformer gets, a generation for each prompt."""
    from edit_compile.calls.record_prompts import Settings, parse_arguments, read_prompts, record_prompts

    more = parse_arguments(argument or ())
    settings = Settings(pipeline, read_prompts(prompts), steps, guidance, seed, height, width, dtype, more)
    made = record_prompts(settings, output, limit, errors)
    typer.echo(f"recorded {made} generations into {output}, {len(settings.prompts) - made} were there")


@app.command(name="compile")
@plain_errors
def compile_model(
    model: Model,
    inputs: Annotated[
        list[Path] | None, typer.Option(help="safetensors file with keyword arguments; once per shape")
    ] = None,
    calls: Calls = None,
    output: Annotated[Path | None, typer.Option(help="folder to write the bundle to")] = None,
    widths: Annotated[str, typer.Option(help="shares of the MLPs' hidden channels")] = ".25,.5,.75,1",
    engine: Engine = "onnxruntime",
    preset: Preset = None,
    timestep: Annotated[str | None, typer.Option(help="the forward's timestep argument, if it cannot be told")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16; default: that of --calls, else float32 or as an elastic one is saved"
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would be compiled; works without weights too")
    ] = False,
) -> None:
    """Compile a model into a bundle."""
    from edit_compile.command_inputs import compile_inputs
    from edit_compile.compiling.compiler import compile as run
    from edit_compile.elastic.transformer import elasticize
    from edit_compile.loading import UserError, load_model, parse_numbers
    from passes.weightless import weightless
    from runtime.routing.policy import RoutingPolicy

    if output is None and not dry_run:
        raise UserError("give --output FOLDER to write the bundle to, or --dry-run")
    given, chosen = compile_inputs(inputs or (), calls, dtype)
    loaded = load_model(model, chosen, bare=dry_run)
    made = run(
        elasticize(loaded) if dry_run and weightless(loaded) else loaded,  # to show what routers would cost
        parse_numbers(widths),
        inputs=given,
        engine=engine,
        policy=RoutingPolicy.preset(preset) if preset else None,
        output=None if dry_run else output,
        dry_run=dry_run,
        timestep=timestep,
    )
    typer.echo(str(made) if dry_run else f"wrote {output}")


@app.command()
@plain_errors
def build(
    bundle: Bundle,
    engine: Annotated[
        str, typer.Option(help="tensorrt or tensorrt-rtx; any other engine is tried on every plan, and nothing is kept")
    ] = "onnxruntime",
    target: Annotated[
        list[str] | None, typer.Option(help="GPU to build for, as sm_120; once per GPU; default: the one here")
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(help="rows of a batch that TensorRT engines take at most; default: 4")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="shared: one engine per plan and width; packed: one per block and width")
    ] = None,
) -> None:
    """Build every plan of a bundle at every width, and show what each costs; TensorRT's are kept in the bundle."""
    from edit_compile.bundles import building, engine_building
    from edit_compile.loading import UserError
    from runtime.engines.tensorrt.jobs import MAX_BATCH
    from runtime.engines.tensorrt.library import MODULES

    if engine in MODULES:
        rows = MAX_BATCH if max_batch is None else max_batch
        try:
            made = engine_building.build_engines(bundle, engine, target or (), weights or "shared", rows)
        except KeyboardInterrupt:
            kept = len(list(bundle.glob("engines/*/*.engine")))
            errors.print(f"interrupted: {kept} engines are kept in {bundle / 'engines'}; the same command goes on")
            raise typer.Exit(130) from None
        console.print(engine_building.table_of(made, engine))
        return
    if target or max_batch is not None or weights is not None:
        raise UserError(f"--target, --max-batch and --weights are for {' and '.join(MODULES)}, not for {engine!r}")
    console.print(building.table_of(building.build(bundle, engine), engine))


@app.command()
@plain_errors
def tune(
    bundle: Bundle,
    calls: Annotated[Path, typer.Option(help="folder of recorded calls (edit-compile record)")],
    output: Annotated[Path, typer.Option(help="folder to write the bundle with its tiers to")],
    budget: Annotated[list[str] | None, typer.Option(help="a tier by its share of the dense FLOPs: fast=.36")] = None,
    quality: Annotated[list[str] | None, typer.Option(help="a tier by its least PSNR in dB: good=33")] = None,
    engine: EngineOfBundle = None,
    work: Annotated[Path | None, typer.Option(help="folder to go on from after a run that was killed")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="draw quality against time as this image")] = None,
) -> None:
    """Find tiers of quality on recorded calls, and write them into a bundle."""
    from edit_compile.tuning.command import Asked, tune_bundle

    tune_bundle(Asked(bundle, calls, output, budget or (), quality or (), engine, work, picture), console)


@app.command()
@plain_errors
def inspect(bundle: Bundle) -> None:
    """Show what a bundle is: its kind, plans, widths, shapes, sizes, versions, policy and tiers."""
    from edit_compile.bundles.inspection import describe
    from runtime.bundle.files import load

    console.print(describe(load(bundle).manifest, bundle))


@app.command()
@plain_errors
def verify(
    bundle: Bundle,
    model: Annotated[str | None, ModelName] = None,
    inputs: Inputs = None,
    calls: Calls = None,
    engine: EngineOfBundle = None,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="largest relative difference allowed; default: .001, .01 in float16, .02 in bfloat16"),
    ] = None,
) -> None:
    """Compare a bundle's numbers with its model's, or, without one, its engine with torch at every width of every plan.

    Status 1 where they differ.
    """
    from edit_compile.bundles.beside_bundle import model_like
    from edit_compile.bundles.verify import TOLERANCE, numbered, table_of
    from edit_compile.bundles.verify import verify as run
    from edit_compile.bundles.verify_widths import verify_widths
    from edit_compile.command_inputs import forms_of
    from runtime.face.load import load

    compiled = load(bundle, engine=engine)
    given = forms_of(compiled, inputs, calls, errors)
    allowed = TOLERANCE.get(compiled.dtype, 1e-3) if tolerance is None else tolerance
    if model is None:
        checks = numbered([list(verify_widths(compiled, form, allowed)) for form in given])
    else:
        eager = model_like(compiled, model)
        checks = numbered([run(compiled, eager, form, allowed) for form in given])
    against = "torch" if model is None else "the model"
    console.print(table_of(checks, f"{compiled.engine} on {compiled.device}, against {against}"))
    if not all(check.passed for check in checks):
        raise typer.Exit(1)


@app.command()
@plain_errors
def bench(
    bundle: Bundle,
    model: Annotated[str, ModelName],
    inputs: Inputs = None,
    calls: Calls = None,
    engine: EngineOfBundle = None,
    steps: Steps = None,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    schedule: Budget = None,
    tier: Annotated[str | None, typer.Option(help="the bundle's tier that decides; default: its own policy")] = None,
    dispatch: Annotated[str, typer.Option(help="where decisions are taken: host or device")] = "host",
    json: Annotated[Path | None, typer.Option(help="write the figures to this file")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="write latency bars to this image")] = None,
) -> None:
    """Time a bundle against its model, interleaved."""
    from edit_compile.bundles.beside_bundle import apply_schedule, dense, model_like
    from edit_compile.command_inputs import steps_of
    from edit_compile.loading import UserError
    from edit_compile.measuring.benchmarking import benchmark
    from runtime.face.load import load

    if schedule is not None and tier is not None:
        raise UserError("--schedule and --tier both say what decides: give one of them")
    compiled = load(bundle, engine=engine, dispatch=dispatch, tier=tier)
    given = steps_of(compiled, inputs, calls, steps, errors)
    apply_schedule(compiled, schedule, len(given))
    found = benchmark(dense(model_like(compiled, model)), compiled, given, repeats=repeats)
    console.print(found)
    if json:
        json.write_text(found.to_json() + "\n")
    if picture:
        found.plot(picture)


@app.command()
@plain_errors
def plot(
    source: Annotated[Path, typer.Argument(help="a bundle, or a trace written by compiled.trace.to_json()")],
    output: Annotated[Path, typer.Option(help="image to write")] = Path("router.png"),
    inputs: Inputs = None,
    calls: Calls = None,
    engine: EngineOfBundle = None,
    steps: Steps = None,
) -> None:
    """Draw what the routers decided, over blocks and steps."""
    from edit_compile.bundles.verify import trace_of
    from edit_compile.command_inputs import steps_of
    from edit_compile.measuring.plot import read_trace, router_heat_map, save
    from runtime.face.load import load

    if source.is_dir():
        compiled = load(source, engine=engine)
        record = trace_of(compiled, steps_of(compiled, inputs, calls, steps, errors))
    else:
        record = read_trace(source.read_text())
    console.print(f"wrote {save(router_heat_map(record), output)}")


if __name__ == "__main__":
    app()
