"""The compiled transformer: what a diffusers pipeline is given in place of the model."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from runtime import engines
from runtime.base.errors import EditError
from runtime.bundle import files as bundle
from runtime.bundle.program import Program
from runtime.engines.choice import Choice
from runtime.face import arguments
from runtime.face.adapters import WithoutAdapters, refuse_adapters
from runtime.face.growing import Tracer
from runtime.face.session import Host, Session
from runtime.face.tiers import WithTiers
from runtime.requests.registry import Requests
from runtime.requests.scope import cache_context, named_requests
from runtime.requests.trace import Counters, Trace
from runtime.routing.policy import Decider

_numbers = itertools.count(1)


class CompiledTransformer(WithTiers, WithoutAdapters, nn.Module):
    """A program run by an engine, called like the model it was compiled from.

    Args:
        program: what to run.
        engine: one of `runtime.engines.TABLE`; "-packed" is for weights inside. When None, the fastest here for one of
            the program's blocks (`runtime.engines.choice`).
        policy: what decides; the program's own policy when None. Settable between calls.
        tracer: makes the program grow where a call has a form that was not compiled. Without it that is a ShapeError.
        host: the model's forward with guards for blocks, for programs whose glue is hosted.
        dispatch: "host", or "device" to take decisions on the GPU, where no step synchronises (`runtime.device`). Where
            that cannot be done they are taken on the host; `dispatch_note` then says why, and so does the log.
        eager: the model itself, in which a program that holds nothing yet has its weights.
        tier: name of one of the program's tiers, which then decides; in place of `policy`. Settable between calls.

    The forward runs without gradients, and in the compiled dtype whatever autocast says. Errors are
    `runtime.base.errors.EditError`. An exception drops the state of the request it came in; a call refused for its
    arguments leaves all requests as they were. Which calls make one generation: docs/requests.md.
    """

    def __init__(
        self,
        program: Program,
        engine: str | None = None,
        policy: Decider | None = None,
        tracer: Tracer | None = None,
        *,
        host: Host | None = None,
        eager: nn.Module | None = None,
        dispatch: str = "host",
        tier: str | None = None,
    ) -> None:
        super().__init__()
        self._tracer, self._host = tracer, host
        self._begin_tiers(program, policy, tier)
        self._eager = (eager,)  # in a tuple: not a submodule
        self._asked_dtype: torch.dtype | None = None
        self._session = Session(program, engine, dispatch, tracer, host, self._hold)
        self.eval()

    @property
    def engine(self) -> str:
        """Name of the engine."""
        return self._session.engine

    @property
    def engine_choice(self) -> Choice | None:
        """By what the engine was chosen; None where it was named."""
        return self._session.choice

    @property
    def program(self) -> Program:
        """What runs; it holds no blocks before the first call of a lazily compiled one."""
        return self._session.program

    @property
    def trace(self) -> Trace:
        """The decisions of the last requests."""
        self._session.settle()
        return self._session.trace

    @property
    def counters(self) -> Counters:
        """The work done since `reset_counters`."""
        self._session.settle()
        return self._session.counters

    def reset_counters(self) -> None:
        """Start counting anew."""
        self._session.settle()
        self._session.reset_counters()

    @property
    def memory_limit(self) -> int | None:
        """Bytes that residuals of all requests may take; None: a quarter of the device's memory.

        Beyond it the requests used longest ago lose their residuals, with a warning, and go on at their own step.
        """
        return self._session.requests.limit

    @memory_limit.setter
    def memory_limit(self, limit: int | None) -> None:
        self._session.requests.limit = limit

    @property
    def config(self) -> Any:
        """The model's configuration, by attribute and by key."""
        return self._session.config

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of latents; that of the weights, unless the module was told to take another (`to`)."""
        return self._asked_dtype or self._session.dtype

    @property
    def device(self) -> torch.device:
        """Where inputs have to be."""
        first = None if self.program.manifest.blocks else next(iter(self._parameters.values()), None)
        return self._session.device if first is None else first.device

    @property
    def dispatch(self) -> str:
        """Where decisions are taken, "host" or "device"; `dispatch_note` says why it is not where they were wanted."""
        return self._session.wanted if self.dispatch_note is None else "host"

    @property
    def dispatch_note(self) -> str | None:
        """Why decisions are taken on the host although they were wanted on the device: those of the last call, or,
        before the first, what is known of this machine and engine."""
        return self._session.why_not_on_device()

    @contextmanager
    def request(
        self, name: str | Sequence[str] | None = None, tier: str | Sequence[str | None] | None = None
    ) -> Iterator[None]:
        """Context manager: calls inside belong to one generation at a time, called `name`, whatever thread they are in.

        It is told from all others, and trusted to go on where its latents do not (a sampler that adds noise). Without a
        name it is a new one, which ends with the ``with`` block; one with a name ends by `reset` inside, or an error.
        With `tier` (see `tiers`) that one decides for the calls of this transformer inside, whatever is chosen for all.

        Several names share the rows of the calls inside, equally many each and in this order. Each of them has its own
        step, timesteps, residuals and, with several entries in `tier`, its own tier (None: what is chosen for all).
        `reset` inside ends them all, and so does an error.

        Raises EditError for a name given twice, no name at all, and a tier that is not there.
        """
        given = f"unnamed request {next(_numbers)}" if name is None else name
        several = isinstance(given, Iterable) and not isinstance(given, (str, bytes))
        names = [str(one) for one in (given if several else [given])]
        if not names or len(set(names)) < len(names) or (several and None in given):
            raise EditError(f"name={names}: give each request that shares the rows a name of its own")
        with self._at(tier, names), named_requests(names):
            try:
                yield
            finally:
                if name is None:
                    Requests.drop_everywhere(names[0])

    def cache_context(self, name: str, **progress: object) -> Any:
        """Context manager: calls inside are those of guidance's branch `name` (diffusers).

        `progress` is what a pipeline tells of where its loop is; the calls themselves say it all.
        """
        return cache_context(name)

    def reset(self) -> None:
        """End the current request: what is called next begins a generation. Raises what the device came upon in it."""
        self._session.end()

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """`reset`, by the name under which diffusers calls it after each image."""
        self.reset()

    def save(self, path: str | Path) -> str:
        """Write the bundle `path`, with the routing policy set and the tiers (see `runtime.bundle.files.save`).

        Gives its digest.

        EditError, naming the tier, for one whose policy is of a class of your own.
        """
        program = self.program
        if not program.manifest.glues:
            raise EditError("nothing to save yet: call the compiled transformer once, or compile with inputs=")
        return bundle.save(self._stored(program), path)

    def hold(self, stored: Program) -> None:
        """Run on the weights of `stored`, read from what was saved of this, in place of its own, which are equal."""
        self._session.hold(stored)

    @torch.no_grad()
    def forward(self, *args: object, **kwargs: object) -> Any:
        """The model's forward: its arguments, and an output with `.sample`, or a tuple.

        Raises InputError for an unknown, missing or unusable argument, ShapeError for shapes or constants that were not
        compiled (unless there is a tracer).
        """
        given = arguments.named(self.program.manifest.arguments, args, kwargs)
        refuse_adapters(given)
        where = self._session.device.type
        autocast = torch.amp.is_autocast_available(where) and torch.is_autocast_enabled(where)
        if autocast:
            given = self._compiled_dtypes(given, torch.get_autocast_dtype(where))
        asked = self._asked_dtype
        if asked is not None:
            given = self._compiled_dtypes(given, asked)
        with torch.autocast(where, enabled=False) if autocast else nullcontext():
            output = self._session(given, self._deciders())
        if asked is None:
            return output
        return pytree.tree_map_only(Tensor, lambda t: t.to(asked) if t.is_floating_point() else t, output)

    def _compiled_dtypes(self, given: Mapping[str, object], source: torch.dtype) -> dict[str, Any]:
        """`given` with tensors of the dtype `source` in the dtypes that they were compiled for."""
        known = {i.name: getattr(torch, i.dtype) for glue in self.program.manifest.glues for i in glue.inputs}

        def cast(name: str, tensor: Tensor) -> Tensor:
            wanted = known.get(name, self._session.dtype)
            return tensor.to(wanted) if tensor.dtype == source and wanted.is_floating_point else tensor

        return arguments.mapped(given, cast)

    def _hold(self, program: Program) -> None:
        """Show the tensors of `program` as parameters; those of the model, as long as there are none."""
        tensors = {**program.weights, **{f"routers.{key}": tensor for key, tensor in program.routers.items()}}
        own: dict[str, nn.Parameter | None] = {}
        own |= {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
        if not program.manifest.blocks and self._eager[0] is not None:
            own = dict(self._eager[0].named_parameters())
        self._parameters = own

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompiledTransformer:
        """What ``.to``, ``.cuda`` and ``.half`` come down to; EditError for a move that cannot be made."""
        before = torch.empty(0, dtype=self.dtype, device=self.device)
        after = fn(before)
        if after.is_meta:
            raise EditError(
                "a compiled transformer holds its weights: it cannot be on the meta device; delete it instead"
            )
        if not self.program.manifest.blocks and self._tracer is not None:
            self._tracer.apply(fn)  # nothing has been compiled: the model itself is moved
            self._session.grow(self._tracer.untraced())
            return self
        if after.device != before.device:
            if self.engine not in engines.MOVABLE and self.engine_choice is None:
                raise EditError(
                    f"engine {self.engine!r} runs where it was loaded: to run on {after.device}, compile or load there"
                )
            self._session.move(lambda tensor: tensor.to(after.device))  # `fn` may cast, too
        if after.dtype != before.dtype:
            self._take(after.dtype)
        return self

    def _take(self, dtype: torch.dtype) -> None:
        """Be called with tensors of `dtype` from now on."""
        own = self._session.dtype
        self._asked_dtype = None if dtype == own else dtype
        if self._asked_dtype is not None:
            warnings.warn(
                f"a compiled transformer keeps computing in {str(own)[6:]}, for which it was compiled: inputs in "
                f"{str(dtype)[6:]} are cast to that, and outputs back; to compute in {str(dtype)[6:]}, convert the "
                "model, then compile it",
                RuntimeWarning,
                stacklevel=2,
            )

    def load_state_dict(self, *args: object, **kwargs: object) -> NoReturn:
        """Refused: the weights of a compiled transformer are fixed."""
        raise EditError("the weights of a compiled transformer are fixed: load them into the model, then compile it")

    def save_pretrained(self, *args: object, **kwargs: object) -> NoReturn:
        """Refused: a compiled transformer is a bundle, not a diffusers model."""
        raise EditError(
            "a compiled transformer is saved as a bundle: compiled.save(path), then edit_compile.load(path)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledTransformer:
        """A twin over the same weights, which are never written to, with requests of its own. It does not grow.

        A tracer makes one program grow. EditError where nothing has been compiled yet.
        """
        if not self.program.manifest.blocks:
            raise EditError("nothing is compiled yet that could be copied: call the compiled transformer once")
        twin = CompiledTransformer(
            self.program,
            self.engine,
            self._policy,
            None,
            host=self._host,
            eager=self._eager[0],
            dispatch=self._session.wanted,
        )
        twin._asked_dtype = self._asked_dtype
        twin._tiers, twin._tier = self._tiers, self._tier
        return twin

    def __copy__(self) -> CompiledTransformer:
        return self.__deepcopy__({})

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise EditError(
            "a compiled transformer is not pickled: compiled.save(path), then edit_compile.load(path) there"
        )

    def __getattr__(self, name: str) -> Any:
        """What pipelines read from a model: its plain attributes, its configuration, and its parts without weights.

        The last are known only as long as the model is beside the program. AttributeError for all else: a method
        or a part of the model would act on weights that are not those that run.
        """
        if name.startswith("_"):
            return super().__getattr__(name)
        manifest = self.program.manifest
        for known in (manifest.attributes, manifest.config):
            if name in known:
                return known[name]
        part = getattr(self._eager[0], name, None)
        if isinstance(part, nn.Module) and next(part.parameters(), None) is None:
            return part
        why = ""
        if isinstance(part, nn.Module):
            why = (
                ": this part of the model holds other weights than those that run (to offload them, offload the whole)"
            )
        elif callable(part):
            why = ": this method of the model runs the model's own weights (docs/your_model.md: methods beside forward)"
        raise AttributeError(f"a compiled transformer has no attribute {name!r}{why}")
