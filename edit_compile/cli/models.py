"""Commands that begin with a model: `train`, `distil`, `record`, `compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edit_compile.cli.base import Calls, Engine, Model, Preset, app, console, errors, plain_errors


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
def distil(
    model: Model,
    settings: Annotated[
        list[str] | None, typer.Argument(help="fields of TrainConfig or Distillation, name=value")
    ] = None,
    calls: Annotated[Path, typer.Option(help="folder of the model's recorded calls (edit-compile record)")] = Path(
        "calls"
    ),
    output: Annotated[Path, typer.Option(help="folder to write the elastic model to")] = Path("elastic"),
    run: Annotated[Path, typer.Option(help="folder of the run; goes on where it stopped")] = Path("runs/distil"),
    budget: Annotated[str, typer.Option(help="share of the dense FLOPs, or the paper's two: gate,width")] = ".5",
    train: Annotated[str, typer.Option(help="routers, lora or all")] = "routers",
    preset: Preset = None,
) -> None:
    """Train routers, adapters or all weights on recorded calls, so that a budget of compute is kept."""
    from edit_compile.training.command import distil_model

    distil_model(model, calls, output, run, budget, train, preset, settings or ())
    typer.echo(f"wrote {output}")


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
    engine: Engine = None,
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
    dump: Annotated[Path | None, typer.Option(help="folder for the graphs after each pass, as text")] = None,
) -> None:
    """Compile a model into a bundle."""
    from edit_compile.command_inputs import compile_inputs
    from edit_compile.compiling.compiler import compile as run
    from edit_compile.elastic.transformer import elasticize
    from edit_compile.loading import UserError, load_model, parse_numbers
    from passes.graphs.weightless import weightless
    from runtime.bundle.files import replaced
    from runtime.face.transformer import CompiledTransformer
    from runtime.routing.policy import RoutingPolicy

    if output is None and not dry_run:
        raise UserError("give --output FOLDER to write the bundle to, or --dry-run")
    given, chosen = compile_inputs(inputs or (), calls, dtype)
    loaded = load_model(model, chosen, bare=dry_run)
    if output is not None and not dry_run and (told := replaced(output)):
        typer.echo(told)
    made = run(
        elasticize(loaded) if dry_run and weightless(loaded) else loaded,  # to show what routers would cost
        parse_numbers(widths),
        inputs=given,
        engine=engine,
        policy=RoutingPolicy.preset(preset) if preset else None,
        output=None if dry_run else output,
        dry_run=dry_run,
        timestep=timestep,
        dump=dump,
    )
    if isinstance(made, CompiledTransformer) and made.engine_choice is not None:
        typer.echo(str(made.engine_choice))
    typer.echo(str(made) if dry_run else f"wrote {output}")
