"""Commands that begin with a bundle: `build`, `tune`, `inspect`, `verify`, `bench`, `plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edit_compile.cli.base import (
    Bundle,
    Calls,
    EngineOfBundle,
    Inputs,
    ModelName,
    Schedule,
    Steps,
    Tier,
    app,
    console,
    errors,
    plain_errors,
)


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
    from edit_compile.bundles.verify import numbered, table_of
    from edit_compile.bundles.verify import verify as run
    from edit_compile.bundles.verify_tiers import verify_tiers
    from edit_compile.bundles.verify_widths import engine_beside_torch, verify_widths
    from edit_compile.command_inputs import forms_of
    from passes.graphs.numbers import TOLERANCE
    from runtime.face.load import built_engine, load

    if model is None and engine is None:
        engine = built_engine(bundle) or engine_beside_torch(load(bundle, engine="torch").dtype)
    compiled = load(bundle, engine=engine)
    given = forms_of(compiled, inputs, calls, errors)
    allowed = TOLERANCE["engine"].get(compiled.dtype, 1e-3) if tolerance is None else tolerance
    if model is None:
        checks = numbered([list(verify_widths(compiled, form, allowed)) for form in given])
    else:
        eager = model_like(compiled, model)
        each = [[*run(compiled, eager, form, allowed), *verify_tiers(compiled, eager, form, allowed)] for form in given]
        checks = numbered(each)
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
    schedule: Schedule = None,
    tier: Tier = None,
    dispatch: Annotated[str, typer.Option(help="where decisions are taken: host or device")] = "host",
    json: Annotated[Path | None, typer.Option(help="write the figures to this file")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="write latency bars to this image")] = None,
) -> None:
    """Time a bundle against its model, interleaved."""
    from edit_compile.bundles.beside_bundle import apply_schedule, decide_in_one_branch, dense, model_like
    from edit_compile.command_inputs import steps_of
    from edit_compile.loading import UserError
    from edit_compile.measuring.benchmarking import benchmark
    from runtime.face.load import load

    if schedule is not None and tier is not None:
        raise UserError("--schedule and --tier both say what decides: give one of them")
    compiled = load(bundle, engine=engine, dispatch=dispatch, tier=tier)
    decide_in_one_branch(compiled, errors.print)
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
    tier: Tier = None,
) -> None:
    """Draw what the routers, or a tier, decided, over blocks and steps."""
    from edit_compile.bundles.beside_bundle import decide_in_one_branch
    from edit_compile.bundles.verify import trace_of
    from edit_compile.command_inputs import steps_of
    from edit_compile.loading import UserError
    from edit_compile.measuring.plot import read_trace, router_heat_map, save
    from runtime.face.load import load

    if source.is_dir():
        compiled = load(source, engine=engine, tier=tier)
        decide_in_one_branch(compiled, errors.print)
        record = trace_of(compiled, steps_of(compiled, inputs, calls, steps, errors))
    elif tier is not None:
        raise UserError(f"--tier is for bundles: {source} is a trace, in which all is decided")
    else:
        record = read_trace(source.read_text())
    console.print(f"wrote {save(router_heat_map(record), output)}")
