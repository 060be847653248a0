"""What all commands share: the app, errors in one line, and options that several take."""

from __future__ import annotations

import functools
import os
import sys
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
# a file or a pipe has no width: tables are not cut
console = Console(width=None if sys.stdout.isatty() else 160, markup=False)
errors = Console(stderr=True, markup=False)

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
    str | None,
    typer.Option(
        help="onnxruntime, torch or inductor; on a GPU onnxruntime-cuda, or, once built, tensorrt(-rtx); default: the "
        "fastest here, measured once"
    ),
]
EngineOfBundle = Annotated[
    str | None, typer.Option(help="as for `compile`; default: that of the engines in the bundle, else the fastest here")
]
Preset = Annotated[str | None, typer.Option(help="routing policy by the paper's model, for example flux")]
Tier = Annotated[str | None, typer.Option(help="the bundle's tier that decides; default: its own policy")]
Schedule = Annotated[
    str | None,
    typer.Option("--schedule", help='decisions at random instead of routed: "gate,width", for example .5,.6'),
]


def fail(message: str) -> NoReturn:
    """Say what the user can put right in one line, and end with status 2."""
    errors.print(f"error: {message}", style="red", highlight=False, soft_wrap=True)
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
