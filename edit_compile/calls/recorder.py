"""Recording the calls that a transformer gets, from a pipeline or a loop of one's own, generation by generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from edit_compile.calls.draft import Draft
from edit_compile.calls.generations import CallsError
from edit_compile.calls.interception import attribute_wrapped, method_overridden
from edit_compile.calls.recorded_model import argument_names_of, name_of, parts_of
from edit_compile.calls.shards import Shards
from runtime.base.errors import EditError
from runtime.face.arguments import named


@contextmanager
def record(
    pipe_or_model: Any, folder: str | Path, *, limit: int = 4 << 30, part: str | None = None
) -> Iterator[Recorder]:
    """Context manager: write the transformer's calls inside the ``with`` block to `folder`, a file per generation.

    Args:
        pipe_or_model: a diffusers pipeline, of which the `transformer` is recorded, or any module: dense, elastic or
            compiled. It computes what it computes without; all that is hung on it is taken off at the end.
        folder: made where it is missing; generations of the same model's that it holds stay, and numbers go on. One
            process at a time.
        limit: bytes that the generations may take on disk. Beyond it every second one is dropped, and so on, with one
            RuntimeWarning.
        part: which of a pipeline's modules is recorded, "transformer" where it is not said. A pipeline with two of
            them is recorded by two `record`, one in the other.

    One generation is

    - what a call of the recorded pipeline makes, or
    - what is called inside ``with recorder.generation():``, or
    - of all other calls those up to the next ``model._reset_stateful_cache()`` (which pipelines of diffusers call after
      each image), the next of the above, or the end of the ``with`` block.

    A generation in which an exception comes is dropped. It is held in memory, on the CPU, until it ends. Call the model
    from one thread at a time.

    Raises:
        CallsError: nothing to record is given, the folder cannot be written to or is another model's, or, at the end of
            a generation, which is dropped: it does not fit `limit`, or a call holds NaN, infinity, or something that
            is neither a tensor nor plain data.
    """
    model, pipe = parts_of(pipe_or_model, part)
    recorder = Recorder(model, Shards(Path(folder), name_of(model), limit))
    with ExitStack() as stack:
        _attach(stack, recorder, model, pipe)
        try:
            yield recorder
        except BaseException:
            recorder.drop()
            raise
        recorder.end()


class Recorder:
    """What `record` gives: the generations so far, and, for loops of one's own, where they begin and end."""

    def __init__(self, model: nn.Module, shards: Shards) -> None:
        self._model, self._shards = model, shards
        self._draft = Draft()
        self._context: str | None = None
        self._inside = False

    @property
    def count(self) -> int:
        """Generations that have ended well, those of earlier runs in the folder and those not kept among them."""
        return self._shards.count

    @contextmanager
    def generation(self) -> Iterator[None]:
        """Context manager: calls inside are one generation. Inside another, or a pipeline's call, it says nothing."""
        if self._inside:
            yield
            return
        self.end()
        self._inside = True
        try:
            yield
        except BaseException:
            self.drop()
            raise
        finally:
            self._inside = False
        self.end()

    def result(self, latents: Tensor) -> None:
        """Say what the sampler of this generation ended with; CallsError where nothing was called yet."""
        if not self._draft.calls and not self._draft.fault:
            raise CallsError("recorder.result(latents) belongs after the calls of a generation, before its end")
        self._draft.end_with(latents)

    def end(self) -> None:
        """End the generation, and write it if it has calls; CallsError, and it is dropped, where it cannot be kept."""
        draft, self._draft = self._draft, Draft()
        if draft.failed:
            return
        if draft.fault is not None:
            raise CallsError(f"generation {self.count} is not recorded: {draft.fault}")
        if draft.calls:
            self._shards.keep(draft)

    def drop(self) -> None:
        """Forget the calls since the last generation's end."""
        self._draft = Draft()

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call of the model begins (a hook)."""
        if self._draft.failed and not self._inside:
            self.drop()
        self._draft.begin()
        try:
            self._draft.take(named(argument_names_of(module), args, kwargs), self._context)
        except EditError as error:
            self._draft.refuse(error)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A call of the model has returned (a hook)."""
        self._draft.finish(output)

    def reset(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In the place of the model's `_reset_stateful_cache`."""
        returned = original(*args, **kwargs)
        if not self._inside:
            self.end()
        return returned

    @contextmanager
    def context(self, original: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """In the place of the model's `cache_context`."""
        outer, self._context = self._context, str(name)
        try:
            with original(name, *args, **kwargs) as entered:
                yield entered
        finally:
            self._context = outer

    def step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In the place of the scheduler's `step`."""
        stepped = original(*args, **kwargs)
        sample = stepped[0] if isinstance(stepped, tuple) and stepped else getattr(stepped, "prev_sample", None)
        first = self._draft.result is None  # steps after it are those of another transformer's calls
        if first and isinstance(sample, Tensor) and self._draft.looks_like_latents(sample):
            self._draft.end_with(sample)
        return stepped


def _attach(stack: ExitStack, recorder: Recorder, model: nn.Module, pipe: Any) -> None:
    """Hang the recorder on the model and, where there is one, on its pipeline, until `stack` is left."""
    before = model.register_forward_pre_hook(recorder.before, with_kwargs=True, prepend=True)
    stack.callback(before.remove)
    after = model.register_forward_hook(recorder.after, with_kwargs=True)
    stack.callback(after.remove)
    for name, around in (("cache_context", recorder.context), ("_reset_stateful_cache", recorder.reset)):
        if callable(getattr(model, name, None)):
            stack.enter_context(attribute_wrapped(model, name, around))
    if pipe is None:
        return

    def call(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with recorder.generation(), ExitStack() as inner:
            if hasattr(getattr(pipe, "scheduler", None), "step"):
                inner.enter_context(method_overridden(pipe.scheduler, "step", recorder.step))
            return original(*args, **kwargs)

    try:
        stack.enter_context(method_overridden(pipe, "__call__", call))
    except (TypeError, AttributeError) as error:
        raise CallsError(
            f"the calls of a {type(pipe).__name__} cannot be told apart ({error}): pass its transformer instead"
        ) from error
