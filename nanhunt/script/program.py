"""A script or module of the user's, run as python itself would run it."""

import builtins
import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any

from nanhunt.errors import NanhuntError

INTERRUPTED = 128 + 2
_OWN_FOLDER = str(Path(__file__).parents[1]) + os.sep


@dataclass(frozen=True)
class Program:
    """What is to be run, loaded but not yet started.

    Attributes:
        code: The compiled script.
        main: The module it runs in, ``__main__``.
        argv: Its command line, its own name first.
        command: What its user wrote: the script or ``-m`` and the module, and the arguments.
    """

    code: CodeType
    main: ModuleType
    argv: Sequence[str]
    command: Sequence[str]

    def execute(self) -> None:
        """Runs it; whatever it raises passes through, ``SystemExit`` included."""
        sys.argv = list(self.argv)
        sys.modules["__main__"] = self.main
        exec(self.code, vars(self.main))


def load_script(path: str, args: Sequence[str]) -> Program:
    """A file, or a folder with a ``__main__.py``; its folder becomes the first place to import from.

    Raises:
        NanhuntError: If there is no such file, or it is no Python.
        SyntaxError: If it is Python with a mistake.
    """
    file = Path(path)
    is_folder = file.is_dir()
    if is_folder:
        file = file / "__main__.py"
        if not file.is_file():
            raise NanhuntError(f"{path} is a folder without a __main__.py")
    name = os.path.abspath(file)
    try:
        with io.open_code(name) as opened:
            source = opened.read()
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise NanhuntError(f"{reason}: {path}", help="`nanhunt run [OPTIONS] script.py [ARGS]`") from error
    try:
        code = compile(source, name, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        if file.suffix == ".py" and b"\0" not in source:
            raise
        raise NanhuntError(f"{path} is not a Python file") from error
    _import_first_from(path if is_folder else os.path.dirname(os.path.realpath(file)))
    main = _main_module({"__file__": name, "__loader__": SourceFileLoader("__main__", name), "__spec__": None})
    return Program(code, main, (path, *args), (path, *args))


def load_module(name: str, args: Sequence[str]) -> Program:
    """A module, or a package with a ``__main__``; the working folder becomes the first place to import from.

    Raises:
        NanhuntError: If there is no such module, or it cannot be run.
        Exception: What the packages above it raise when they are imported.
    """
    _import_first_from(os.getcwd())
    spec = _spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = _spec(f"{name}.__main__")
        if spec is None:
            raise NanhuntError(f"{name} is a package without a __main__ and cannot be run")
    if spec is None:
        raise NanhuntError(f"no module named {name}", help="as for `python -m`: a dotted name, without .py")
    loader: Any = spec.loader
    code = loader.get_code(spec.name) if hasattr(loader, "get_code") else None
    if code is None:
        raise NanhuntError(f"there is no Python code to run in {name}")
    main = _main_module(
        {
            "__file__": spec.origin,
            "__cached__": spec.cached,
            "__loader__": loader,
            "__package__": spec.parent,
            "__spec__": spec,
        }
    )
    return Program(code, main, (spec.origin or name, *args), ("-m", name, *args))


def _spec(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        # A package above it is missing; one that is there and misses something else is the user's to see.
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            return None
        raise
    except ValueError:
        # A module that is loaded already and was made by hand.
        return None


def _import_first_from(folder: str) -> None:
    if not sys.flags.safe_path:
        sys.path[0] = folder


def _main_module(attributes: dict[str, Any]) -> ModuleType:
    main = ModuleType("__main__")
    vars(main).update({"__builtins__": builtins, "__package__": None, "__cached__": None, **attributes})
    return main


def exit_code_of(error: BaseException | None) -> int:
    """What a shell is told of a program that ended so."""
    if error is None:
        return 0
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if not isinstance(error, SystemExit):
        return 1
    if error.code is None:
        return 0
    return error.code if isinstance(error.code, int) else 1


def show_ending(error: BaseException) -> None:
    """Says what python would say of the program's end: a traceback, without our own frames, or a last message."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    if isinstance(error, SystemExit):
        if error.code is not None and not isinstance(error.code, int):
            sys.stderr.write(f"{error.code}\n")
        return
    _cut(error, set())
    sys.excepthook(type(error), error, error.__traceback__)


def _cut(error: BaseException | None, seen: set[int]) -> None:
    """Takes our own frames out of the traceback, and out of those of the exceptions it came from."""
    if error is None or id(error) in seen:
        return
    seen.add(id(error))
    frames = []
    trace = error.__traceback__
    while trace is not None:
        if not trace.tb_frame.f_code.co_filename.startswith(_OWN_FOLDER):
            frames.append(trace)
        trace = trace.tb_next
    kept: TracebackType | None = None
    for frame in reversed(frames):
        kept = TracebackType(kept, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    error.__traceback__ = kept
    for other in (error.__cause__, error.__context__, *getattr(error, "exceptions", ())):
        _cut(other, seen)
