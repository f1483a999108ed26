"""What a user names as `module:name`: looked up beside their files and among what is installed; errors of their code are told with file and line."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from edgekd.errors import ConfigError, EdgekdError, near_names
from edgekd.identity.code_text import is_library
from edgekd.tree import first_line


@contextmanager
def first_on_path(folder: Path) -> Iterator[None]:
    """A block in which modules are looked for in `folder` first."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:  # the user's code may have changed the list
            sys.path.remove(entry)


def named_object(text: str, folder: Path) -> Any:
    """The object called `module:name`; a dotted name leads into it. Call it inside `first_on_path(folder)`.

    Raises:
        ConfigError: this is no such name, nothing is called so, its module cannot be imported, or another one of its name is loaded already.
    """
    module_name, name = _split(text)
    found = _module(text, module_name, folder)
    for part in name.split("."):
        with own_errors(text):
            there = hasattr(found, part)
        if not there:
            names = [other for other in dir(found) if not other.startswith("_")]
            raise ConfigError(f"{module_name} has no {part!r}", found=text, allowed=near_names(part, names), subject=text)
        found = getattr(found, part)
    return found


def made_by(found: Any, text: str) -> Any:
    """What a function without arguments, or a class, gives; `text` is how the user named it.

    Raises:
        ConfigError: it needs arguments, or it raises.
    """
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise ConfigError(
            f"{text} cannot be called without arguments",
            found=str(error),
            hint="name an object, or a function without arguments that makes it",
            subject=text,
        ) from error
    except ValueError:  # a callable that does not tell its arguments
        pass
    with own_errors(text):
        return found()


@contextmanager
def own_errors(text: str) -> Iterator[None]:
    """A block that runs the code of the user's which is named `text`. What edgekd itself raises in it stays as it is.

    Raises:
        ConfigError: the code raises, or ends the process; names its module, the error, and the last line of the user's own that was run.
    """
    try:
        yield
    except EdgekdError:
        raise
    except (Exception, SystemExit) as error:
        raise _told(error, text) from error


def _split(text: str) -> tuple[str, str]:
    module_name, colon, name = text.partition(":")
    if not colon or module_name == "__main__" or not all(part.isidentifier() for part in (*module_name.split("."), *name.split("."))):
        raise ConfigError(
            "this is not module:name",
            found=text,
            allowed="the dotted name of a module, a colon, and a name in it, for example model:make_net",
            hint="write a file as its module: nets/model.py is nets.model" if ".py" in module_name or "/" in module_name else None,
            subject=text,
        )
    return module_name, name


def _module(text: str, name: str, folder: Path) -> Any:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not error.name:
            raise _told(error, text) from error
        if error.name != name and not name.startswith(f"{error.name}."):
            raise ConfigError(
                f"the module {name!r} needs {error.name!r}, which is not installed",
                found=f"{error}{_place(error)}",
                hint=f"pip install {error.name}",
                subject=text,
            ) from error
        beside = sorted(path.stem for path in folder.glob("*.py"))
        raise ConfigError(
            f"the module {name!r} does not exist",
            found=text,
            allowed=f"{near_names(name, beside)} in {folder}, or an installed module",
            hint="run from the folder that holds it (for a job: put it beside the file), or install it",
            subject=text,
        ) from error
    except EdgekdError:
        raise
    except (Exception, SystemExit) as error:
        raise _told(error, text) from error
    place, here = Path(getattr(module, "__file__", None) or "."), folder / f"{name.replace('.', '/')}.py"
    if here.is_file() and place.resolve() != here.resolve():
        raise ConfigError(f"another module called {name!r} is loaded already", found=str(place), allowed=str(here), hint="rename the file", subject=text)
    return module


def _told(error: BaseException, text: str) -> ConfigError:
    """An error of the user's own code in the words of edgekd."""
    module_name = text.partition(":")[0]
    return ConfigError(
        f"the code of {module_name!r} raises {type(error).__name__}",
        found=f"{first_line(error)}{_place(error)}",
        hint="repair it there; called from Python the same code shows its whole traceback",
        subject=text,
    )


def _place(error: BaseException) -> str:
    """` (file, line N)` of the last line that was run of the user's own, else of a library; nothing where no Python was run."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}, line {error.lineno})"
    places = [(module, place) for module, place in _frames(error.__traceback__) if module.partition(".")[0] not in ("edgekd", "importlib")]
    own = [place for module, place in places if not is_library(module)]
    last = (own or [place for _, place in places])[-1:]
    return f" ({last[0]})" if last else ""


def _frames(traceback: TracebackType | None) -> Iterator[tuple[str, str]]:
    """Of every frame its module and its place, outermost first."""
    while traceback is not None:
        frame = traceback.tb_frame
        yield str(frame.f_globals.get("__name__", "")), f"{frame.f_code.co_filename}, line {traceback.tb_lineno}"
        traceback = traceback.tb_next
