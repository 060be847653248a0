"""A folder written whole or not at all, and tensors made fit for safetensors."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

_EXCHANGE = 2
"""RENAME_EXCHANGE of renameat2(2)."""
_HERE = -100
"""AT_FDCWD: paths are those of the process."""
_OLD = "old"
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A new folder to write into; when the ``with`` block ends well it takes the place of `target`, else it goes.

    Where the system can exchange two names (Linux, most file systems), a reader finds the old folder or the new one,
    whenever the process is killed; elsewhere there is none for a moment. What killed processes left is swept up.
    """
    target = target.resolve() if target.is_symlink() else target
    target.parent.mkdir(parents=True, exist_ok=True)
    _put_back(target)
    folder = Path(tempfile.mkdtemp(prefix=f"{_prefix(target)}{os.getpid()}.", dir=target.parent))
    try:
        yield folder
        _open_up(folder)
        _swap(folder, target)
        sweep(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def temporary_beside(target: Path) -> Path:
    """A file's name to write under before it is renamed `target`; `sweep` knows it."""
    return target.with_name(f"{_prefix(target)}{os.getpid()}.{threading.get_ident()}.tmp")


def write_whole(target: Path, data: bytes) -> None:
    """Write the file `target` under another name and rename it: a reader finds what was there or `data`, whole."""
    sweep(target)
    beside = temporary_beside(target)
    try:
        beside.write_bytes(data)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def file_beside(target: Path) -> Iterator[Path]:
    """A file's name to write under and rename to `target`, in a folder of its own that goes after the ``with`` block.

    What is written under other names on the way, as safetensors does, is in that folder, too, so that `sweep` finds it.
    """
    sweep(target)
    folder = temporary_beside(target)
    folder.mkdir()
    try:
        yield folder / "new"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(target: Path) -> None:
    """Remove what processes of this machine that are no more left beside `target` while they wrote it."""
    for left in _left(target):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)  # others may sweep, too
        else:
            left.unlink(missing_ok=True)


def mode_of_new_files(folder: Path) -> int:
    """The permissions that the umask gives to a new file; safetensors and tempfile give them to the owner alone."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as place:
        probe = Path(place) / "probe"
        probe.touch()
        return probe.stat().st_mode & 0o777


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share a storage, as safetensors wants them."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        if own.untyped_storage().data_ptr() in seen and own.numel():
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        result[name] = own
    return result


def _left(target: Path) -> Iterator[Path]:
    """What processes of this machine that are no more left beside `target`."""
    prefix = _prefix(target)
    for path in target.parent.glob(f"{_escaped(prefix)}*"):
        process = path.name.removeprefix(prefix).partition(".")[0]
        if process.isdecimal() and not _alive(int(process)):
            yield path


def _put_back(target: Path) -> None:
    """Where a process was killed between two renames, what was there before is put back."""
    if not target.exists():
        for left in _left(target):
            if (left / _OLD).is_dir():
                (left / _OLD).rename(target)
                return


def _prefix(target: Path) -> str:
    return f".{target.name}.{platform.node()}."


def _escaped(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _open_up(folder: Path) -> None:
    """Give everything in it, and itself, the permissions of new files and folders."""
    mode = mode_of_new_files(folder)
    for path in (folder, *folder.rglob("*")):
        path.chmod(mode | (mode & 0o444) >> 2 if path.is_dir() else mode)


def _swap(folder: Path, target: Path) -> None:
    """Put `folder` in the place of `target`, and what was there in its own; on failure `target` is what it was."""
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        if not _exchanged(folder, target):
            _swap_in_two(folder, target)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names at once; False where the system cannot."""
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if exchange is None:
        return False
    if exchange(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNKNOWN:
        return False
    raise OSError(code, os.strerror(code), str(other))


def _swap_in_two(folder: Path, target: Path) -> None:
    old = Path(tempfile.mkdtemp(prefix=f"{_prefix(target)}{os.getpid()}.", dir=target.parent)) / _OLD
    target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        old.rename(target)
        raise
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)
