"""The folder that generations are recorded into: their numbers, their files, and the limit of their size.

Generation number i is kept where the stride divides i. When the files outgrow the limit, the stride doubles and those
that it no longer divides are deleted: what is kept is spread evenly over all that was seen, whenever the run ends.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from edit_compile.calls.draft import Draft
from edit_compile.calls.generations import (
    FORMAT,
    METADATA,
    CallsError,
    Contents,
    beginning,
    beginning_of,
    file_name,
    files_of,
    read_contents,
)
from edit_compile.files import write_file_atomically
from runtime.bundle.folder import file_beside, mode_of_new_files

STATE = "recording.json"


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the files alone do not tell: how many generations were seen, and of how many one is kept."""

    count: int = 0
    stride: int = 1


class Shards:
    """Generations in `folder`, at most `limit` bytes of them; numbers go on where those in the folder end.

    `model` names what is recorded. One process at a time may write to a folder. CallsError where it cannot be
    written to, or holds generations of another model.
    """

    def __init__(self, folder: Path, model: str, limit: int) -> None:
        if limit <= 0:
            raise CallsError(f"limit={limit}: give the bytes that generations may take on disk, more than 0")
        self.folder, self.model, self.limit = folder, model, limit
        with _said_of(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for remains in folder.glob(".generation-*.tmp"):
                remains.unlink(missing_ok=True)
            self._sizes = {number: path.stat().st_size for number, path in files_of(folder).items()}
        state = _read_state(folder / STATE)
        self.stride, self.count = state.stride, max(state.count, max(self._sizes, default=-1) + 1)
        self._check_model()
        self._beginnings: dict[bytes, int] = {}
        for number in self._sizes:
            with suppress(CallsError, SafetensorError, ValueError):  # what cannot be read is told when it is read
                self._beginnings.setdefault(beginning_of(folder / file_name(number)), number)
        self._warned = self._warned_of_twins = False

    def keep(self, draft: Draft) -> None:
        """Number the generation, and write it where its number is one to keep; CallsError where it does not fit."""
        number = self.count
        if number % self.stride == 0:
            contents = Contents(FORMAT, self.model, number, tuple(draft.calls), draft.result)
            with self._written(number, draft.tensors, contents) as temporary:
                size = temporary.stat().st_size
                self._make_room(number, size)
                if number % self.stride == 0:
                    temporary.replace(self.folder / file_name(number))
                    self._sizes[number] = size
                    self._warn_of_twins(number, beginning(draft.calls[0], draft.tensors))
        if number % self.stride:
            self._warn()
        self.count += 1
        with _said_of(self.folder):
            write_file_atomically(self.folder / STATE, msgspec.json.encode(State(self.count, self.stride)).decode())

    def _check_model(self) -> None:
        if self._sizes:
            found = read_contents(self.folder / file_name(max(self._sizes))).model
            if found != self.model:
                raise CallsError(
                    f"{self.folder} holds generations of {found}, these are of {self.model}: give another folder"
                )

    @contextmanager
    def _written(self, number: int, tensors: Mapping[str, Tensor], contents: Contents) -> Iterator[Path]:
        """The generation in a file under a temporary name, which is gone afterwards."""
        with _said_of(self.folder), file_beside(self.folder / file_name(number)) as temporary:
            save_file(dict(tensors), temporary, {METADATA: msgspec.json.encode(contents).decode()})
            temporary.chmod(mode_of_new_files(temporary.parent))
            yield temporary

    def _make_room(self, number: int, size: int) -> None:
        """Double the stride until the files, with one of `size` bytes for generation `number`, are within the limit."""
        if size > self.limit:
            raise CallsError(
                f"{self.folder}: one generation takes {size} bytes, more than limit={self.limit}: give a larger limit, "
                "or record fewer steps"
            )
        while self._total(number, size) > self.limit:
            self._warn()
            self.stride *= 2
            for other in [other for other in self._sizes if other % self.stride]:
                (self.folder / file_name(other)).unlink(missing_ok=True)
                del self._sizes[other]

    def _total(self, number: int, size: int) -> int:
        return sum(self._sizes.values()) + (size if number % self.stride == 0 else 0)

    def _warn_of_twins(self, number: int, begins: bytes) -> None:
        """Say so, once, where generation `number` begins as one that is kept does."""
        twin = self._beginnings.setdefault(begins, number)
        if twin not in self._sizes:  # no longer kept
            self._beginnings[begins] = number
        elif twin != number and not self._warned_of_twins:
            self._warned_of_twins = True
            warnings.warn(
                f"generation {number} recorded in {self.folder} begins as generation {twin} does (the same latents, "
                "timestep and prompt): what is recorded twice counts twice in what is tuned or trained on it; give "
                "each generation a seed of its own, or another folder",
                RuntimeWarning,
                stacklevel=2,
            )

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"generations recorded in {self.folder} outgrow limit={self.limit} bytes: only every second of them is "
                "kept, of those again every second when they do again, so that they spread over the whole run",
                RuntimeWarning,
                stacklevel=2,
            )


def _read_state(path: Path) -> State:
    if not path.exists():
        return State()
    try:
        state = msgspec.json.decode(path.read_bytes(), type=State)
    except (OSError, msgspec.DecodeError) as error:
        raise CallsError(f"{path} cannot be read ({error}): delete it, and the files are counted instead") from error
    if state.count < 0 or state.stride < 1:
        raise CallsError(f"{path} makes no sense: delete it, and the files are counted instead")
    return state


@contextmanager
def _said_of(folder: Path) -> Iterator[None]:
    """CallsError for what the file system, or the file's format, does not allow."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CallsError(f"{folder} cannot be written to: {error}") from error
