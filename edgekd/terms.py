"""A bundle's terms: the profile and the task that judged it travel as data, and nothing in them may name code, a path or a host to reach."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from edgekd.contracts import Task
from edgekd.errors import BundleError, ConfigError
from edgekd.identity.provenance import code_hash, describe_factory
from edgekd.records import Manifest, Profile, TransportConfig
from edgekd.settings.named import first_on_path, made_by, named_object
from edgekd.settings.profile_fields import plain, toml_text
from edgekd.settings.profile_file import list_profiles
from edgekd.tasks import Classification, MultiTask, Regression, as_task, task_from

_REACHED = ("local",)
"""The transports that a bundle may ask for by itself: they reach no other machine."""


# ---------------------------------------------------------------------------------------------- the profile


def portable(profile: Profile) -> tuple[Profile, tuple[str, ...]]:
    """The profile as it may travel in a bundle, and the keys that had to stay behind.

    Of the transport only its kind travels. Of the runtime's options numbers and yes or no travel; a text may be a path, a library or a secret.
    """
    known = TransportConfig(kind=profile.transport.kind)
    behind = [f"transport.{name}" for name in known.__struct_fields__ if getattr(profile.transport, name) != getattr(known, name)]
    options = {key: value for key, value in profile.runtime.options.items() if not isinstance(value, str)}
    behind += [f"runtime.options.{key}" for key in sorted(set(profile.runtime.options) - set(options))]
    return msgspec.structs.replace(profile, transport=known, runtime=msgspec.structs.replace(profile.runtime, options=options)), tuple(behind)


def profile_of(manifest: Manifest) -> Profile:
    """The bundle's own profile, if this machine may act on it without being asked.

    Raises:
        BundleError: it reaches another machine, or holds what `portable` leaves behind.
    """
    profile = manifest.profile
    if profile.transport.kind not in _REACHED:
        raise BundleError(
            "the bundle's profile reaches its device in a way that a bundle cannot ask for",
            found=f'transport.kind = "{profile.transport.kind}"',
            allowed=", ".join(_REACHED),
            hint="name the target yourself: --target NAME, or the path of a profile",
            subject=profile.name,
        )
    behind = portable(profile)[1]
    if behind:
        raise BundleError(
            "the bundle's profile sets what a bundle may not bring",
            found=", ".join(behind),
            allowed="a transport's kind; numbers and true or false as options of the runtime",
            hint="name the target yourself: --target NAME, or the path of a profile",
            subject=profile.name,
        )
    return profile


def differences(bundle: Profile, other: Profile) -> tuple[str, ...]:
    """What another profile sets otherwise than the bundle's, for example `measure.verdict.launches is 10, in the bundle 20`."""
    theirs, ours = dict(_fields(plain(portable(bundle)[0]))), dict(_fields(plain(portable(other)[0])))
    words = ("description", "proof", "name")
    keys = [key for key in sorted(theirs | ours) if key not in words and theirs.get(key, _ABSENT) != ours.get(key, _ABSENT)]
    return tuple(f"{key} is {_text(ours.get(key, _ABSENT))}, in the bundle {_text(theirs.get(key, _ABSENT))}" for key in keys)


_ABSENT = object()


def _text(value: object) -> str:
    return "not set" if value is _ABSENT else toml_text(value)


def _fields(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def profile_here(name: str) -> Profile | None:
    """The profile that this name stands for here and now; a name from a bundle is compared with those on the search path, never opened as a path."""
    return next((entry.profile for entry in list_profiles() if entry.name == name), None)


# ---------------------------------------------------------------------------------------------- the task


def own_code(task: Task) -> tuple[str, str]:
    """`module:qualname` and hash of a task that a gate cannot make from its description; two empty texts for edgekd's own.

    The name is that of the task's class, or of the first part that is not edgekd's; one that cannot be imported stands as it is, for example
    `__main__:Mine`. The hash is `code_hash` of the whole task: its source and what it was made with.
    """
    mine = _own_class(task)
    return ("", "") if mine is None else (f"{mine.__module__}:{mine.__qualname__}", code_hash(task))


def _own_class(task: Task) -> type | None:
    parts = tuple(task.tasks.values()) if isinstance(task, MultiTask) else ()
    return next((type(one) for one in (task, *parts) if type(one) not in (Classification, Regression, MultiTask)), None)


_ASKED = "--task MODULE:NAME of the task as the run made it: its class if that was called without arguments, else the object or a function that makes it"


def own_task_text(task: Task) -> str:
    """What a gate needs because the task is the user's own; empty for edgekd's own."""
    mine = _own_class(task)
    if mine is None:
        return ""
    why = describe_factory(mine).rebuildable
    asks = f"the task is your own class {mine.__module__}:{mine.__qualname__}: a gate imports nothing that a bundle names, so it needs {_ASKED}"
    return asks if why == "yes" else f"{asks}; and it cannot be imported: {why.replace('factory', 'class')}"


def task_of(manifest: Manifest, given: Task | str | None, folder: Path) -> Task:
    """The task that judges: made from the manifest's description, or the user's own, which the caller must give or name.

    `given` is a task, or `module:name` of one, of its class, or of a function that gives it; the latter two are called without arguments.
    The current folder is looked in first. `folder` is the bundle's.

    Raises:
        ConfigError: the name leads nowhere, to no task, or to what needs arguments, or the current folder lies in the bundle, whose files
            are not imported.
        BundleError: the bundle was judged by a task of its maker's own and none is given, or the given one has another source or was made
            with other arguments.
    """
    if given is None:
        if manifest.task_code:
            raise BundleError(
                "the bundle was judged by a task that is not edgekd's, and a gate imports nothing that a bundle names",
                found=manifest.task_code,
                hint=f"if you trust this code: --task {manifest.task_code} where the run made it without arguments, else --task module:name of the object "
                "or of a function that makes it as the run did; from Python task= with the object",
                subject=manifest.task_code,
            )
        return task_from(manifest.task)
    task = as_task(_named(given, folder)) if isinstance(given, str) else as_task(given)
    name, digest = own_code(task)
    if task.describe() != manifest.task or name != manifest.task_code:
        raise BundleError(
            "this is not the task that the bundle was judged by",
            found=f"{name or 'edgekd'}: {task.describe()}",
            allowed=f"{manifest.task_code or 'edgekd'}: {manifest.task}",
            hint="give the one that the run was given",
            subject=manifest.task_code,
        )
    if digest != manifest.task_hash:
        raise BundleError(
            "the task's source, or what it was made with, is not that of the task that judged the bundle",
            found=f"{name} with SHA-256 {digest[:16]}",
            allowed=f"SHA-256 {manifest.task_hash[:16]}",
            hint="if the run made it with arguments: --task module:name of an object, or of a function without arguments that makes it so; from Python "
            "task= with the object. If its source changed: restore the module's file, or make the bundle again",
            subject=name,
        )
    return task


def _named(text: str, bundle: Path) -> Any:
    """The object called `module:name`; a class, or what is no task but can be called, is called without arguments."""
    here = Path.cwd()
    if here.resolve().is_relative_to(bundle.resolve()):
        raise ConfigError("code is not imported from a bundle", found=f"the current folder {here}", hint="run from another folder", subject=text)
    with first_on_path(here):
        found = named_object(text, here)
        if not inspect.isclass(found) and (isinstance(found, Task) or not callable(found)):
            return found
        return made_by(found, text)
