"""Job files: a compression written down as TOML, with teacher, data and student named as `module:function` beside it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import BudgetError, ConfigError, near_names
from edgekd.options import ConvertOptions, Options, QuantizeOptions, SearchOptions, TrainOptions
from edgekd.records import Budget, Record
from edgekd.records.model import NonNegative
from edgekd.settings.named import first_on_path, made_by, named_object
from edgekd.settings.toml_file import TomlText, apply_overrides, check_known, load_toml, parse_overrides, to_record

if TYPE_CHECKING:
    from edgekd.contracts import StudentSpace, Target
    from edgekd.fleet import Fleet
    from edgekd.planning import Plan
    from edgekd.result import Result

_PROFILE_TABLES = ("transport", "runtime", "measure")
"""What `--set` addresses in the target's profile; every other name is one of the job's."""


class JobData(Record, tag="edgekd.job_data/1", frozen=True, kw_only=True):
    """Where the splits come from: `module:function`, or a folder of `.npy` files. `augment` names a function `(x, generator)`."""

    train: str
    validation: str
    test: str
    augment: str = ""


class JobStudent(Record, tag="edgekd.job_student/1", frozen=True, kw_only=True):
    """The space: `factory` with `choices` is a family, `fixed` is one student (`module:function` or an ONNX file).

    `where` names a function that says which choices count, `init` one that copies weights from the teacher.
    """

    factory: str = ""
    fixed: str = ""
    choices: dict[str, tuple[int | float | str | bool, ...]] = {}
    where: str = ""
    init: str = ""


class JobSpec(Record, tag="edgekd.job/1", frozen=True, kw_only=True):
    """What a job file may hold. `target` is a profile, or several: each then gets a student of its own.

    `profile` overrides fields of the targets' profiles, for example `[profile.runtime]`.
    """

    teacher: str
    data: JobData
    budget: Budget
    student: JobStudent
    task: str = "classification"
    target: str | tuple[str, ...] = "local"
    seed: NonNegative = 0
    run_dir: str = ""
    cache_dir: str = ""
    options: Options = Options()
    profile: dict[str, Any] = {}


@dataclass(frozen=True)
class Job:
    """A job that was read and checked; nothing of the user's was imported yet. Paths are relative to the file's folder."""

    path: Path
    spec: JobSpec
    document: TomlText

    @property
    def folder(self) -> Path:
        """The folder of the job file; it stands first on `sys.path` while the job's functions are looked up and run."""
        return self.path.parent.resolve()

    @property
    def run_dir(self) -> Path:
        """Where the run's outputs go: `run_dir`, else `runs/<name of the job file>` beside it."""
        return self.folder / (self.spec.run_dir or f"runs/{self.path.stem}")

    @property
    def targets(self) -> tuple[str, ...]:
        """The profiles' names, or their paths made absolute."""
        given = self.spec.target
        names = (given,) if isinstance(given, str) else given
        return tuple(str(self.folder / name) if "/" in name or name.endswith(".toml") else name for name in names)

    def run(self, *, run_dir: Path | None = None, progress: bool = True) -> Result | Fleet:
        """What `edgekd.compress` gives on this job, or `edgekd.compress_for` where it names several targets.

        A killed run goes on when it is called again.

        Raises:
            ConfigError: a function cannot be found or imported; the message names the line.
        """
        from edgekd.fleet import compress_for
        from edgekd.pipeline import compress

        with self.first_on_path(), self._open() as targets:
            arguments = self.arguments(run_dir)
            if len(targets) == 1:
                return compress(target=targets[0], progress=progress, **arguments)
            return compress_for(targets, progress=progress, **arguments)

    def plan(self, *, run_dir: Path | None = None) -> tuple[Plan, ...]:
        """What `run` would do on each target, without doing it: stages, measurements, minutes and disk."""
        from edgekd.fleet import plan_for
        from edgekd.pipeline import plan

        with self.first_on_path(), self._open() as targets:
            arguments = self.arguments(run_dir)
            if len(targets) == 1:
                return (plan(target=targets[0], **arguments),)
            return plan_for(targets, **arguments)

    @contextmanager
    def _open(self) -> Iterator[list[Target]]:
        """Every target of the job, open."""
        from edgekd.target import connect

        with ExitStack() as stack:
            yield [stack.enter_context(connect(name, overrides=self.spec.profile)) for name in self.targets]

    def arguments(self, run_dir: Path | None = None) -> dict[str, Any]:
        """The arguments of `edgekd.compress` but for the target; call it inside `first_on_path`."""
        spec = self.spec
        return {
            "teacher": self._onnx(spec.teacher) or self._made(("teacher",), spec.teacher),
            "task": spec.task if ":" not in spec.task else self._made(("task",), spec.task),
            "train": self._split("train"),
            "validation": self._split("validation"),
            "test": self._split("test"),
            "augment": self._named(("data", "augment"), spec.data.augment) if spec.data.augment else None,
            "budget": spec.budget,
            "student": self._space(),
            "run_dir": run_dir or self.run_dir,
            "cache_dir": self.folder / spec.cache_dir if spec.cache_dir else None,
            "seed": spec.seed,
            "options": spec.options,
        }

    def first_on_path(self) -> AbstractContextManager[None]:
        """The job's folder first on `sys.path`."""
        return first_on_path(self.folder)

    def _space(self) -> StudentSpace:
        from edgekd.spaces import Family, Fixed

        student = self.spec.student
        hooks = {name: self._named(("student", name), value) for name in ("where", "init") if (value := getattr(student, name))}
        if student.fixed:
            onnx = self._onnx(student.fixed)
            return Fixed(onnx or self._importable(("student", "fixed"), student.fixed), init=hooks.get("init"))
        factory = self._importable(("student", "factory"), student.factory)
        arguments: dict[str, Any] = {name: list(values) for name, values in student.choices.items()}
        return Family(factory, **(hooks | arguments))

    def _split(self, name: str) -> Any:
        text = getattr(self.spec.data, name)
        folder = self.folder / text
        if folder.is_dir():
            from edgekd.npy import load_folder

            return load_folder(folder)
        if ":" not in text:
            raise self.document.problem(
                ("data", name), "the folder does not exist", found=str(folder), allowed="a folder with NAME.npy and targets.npy, or module:function"
            )
        return self._made(("data", name), text)

    def _onnx(self, text: str) -> Path | None:
        return self.folder / text if text.endswith(".onnx") else None

    def _made(self, key: tuple[str, ...], text: str) -> Any:
        """What a function without arguments or a class gives; any other object as it is."""
        found = self._named(key, text)
        if not inspect.isroutine(found) and not inspect.isclass(found):
            return found
        with self._placed(key):
            return made_by(found, text)

    def _importable(self, key: tuple[str, ...], text: str) -> Callable[..., Any]:
        """A factory that a bundle can name: it must be importable again from its module."""
        found: Callable[..., Any] = self._named(key, text)
        module, name = getattr(found, "__module__", ""), getattr(found, "__qualname__", "")
        if not callable(found) or module == "__main__" or "<" in name:
            raise self.document.problem(
                key,
                "a student's factory must be importable by name",
                found=f"{text} is {name or type(found).__name__}",
                hint="write `def make_net(width): ...`",
            )
        return found

    def _named(self, key: tuple[str, ...], text: str) -> Any:
        """The object called `module:name`, with the job's folder in front."""
        with self._placed(key):
            return named_object(text, self.folder)

    @contextmanager
    def _placed(self, key: tuple[str, ...]) -> Iterator[None]:
        """A block whose errors about a name are told with the line of the job file that holds it."""
        try:
            yield
        except ConfigError as error:
            raise self.document.problem(key, error.what, found=error.found, allowed=error.allowed, hint=error.hint) from error


def load_job(path: Path | str, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Job:
    """The job in a TOML file, checked but not started.

    `overrides` are `name=value` texts; `runtime.…`, `transport.…` and `measure.…` go to the target's profile, all others
    to the job: `("options.train.epochs=3", "runtime.threads=2")`.

    Raises:
        ConfigError: the file is missing or malformed, a key is unknown, a value is of the wrong type; with the line.
        BudgetError: the budget contradicts itself.
    """
    place = Path(path)
    routed = {".".join((["profile"] if keys[0] in _PROFILE_TABLES else []) + list(keys)): value for keys, value in parse_overrides(overrides).items()}
    document = apply_overrides(load_toml(place), routed)
    _check_inner_names(document)
    check_known(document, (), document.data, JobSpec.__struct_fields__)
    for key in ("teacher", "data", "budget", "student"):
        if key not in document.data:
            raise document.problem((), f"{key!r} is missing", allowed=near_names("", ("teacher", "data", "budget", "student")), hint=_EXAMPLES[key])
    try:
        to_record(document, Budget, ("budget",))
    except BudgetError as error:
        raise BudgetError(
            f"{document.where(('budget',))}: {error.what}", found=error.found, allowed=error.allowed, hint=error.hint, subject="budget"
        ) from error
    spec = to_record(document, JobSpec)
    if not spec.target:
        raise document.problem(("target",), "a job needs a target", found=spec.target, hint="`edgekd targets` lists them")
    if bool(spec.student.factory) == bool(spec.student.fixed):
        raise document.problem(
            ("student",), "a student is either a factory with choices, or fixed", found="both" if spec.student.factory else "neither", hint=_EXAMPLES["student"]
        )
    if spec.student.factory and not spec.student.choices:
        raise document.problem(
            ("student",), "a factory needs choices", hint="add [student.choices] with width = [8, 16], or write fixed = instead of factory ="
        )
    return Job(place, spec, document)


def _check_inner_names(document: TomlText) -> None:
    """Refuse a key at the top that belongs inside a table, with its whole name: `accept_simulated` is `options.accept_simulated`."""
    inner = {"budget": Budget, "data": JobData, "student": JobStudent, "options": Options, "options.train": TrainOptions}
    inner |= {"options.search": SearchOptions, "options.quantize": QuantizeOptions, "options.convert": ConvertOptions}
    for key in document.data:
        if key in JobSpec.__struct_fields__:
            continue
        whole = [f"{table}.{key}" for table, kind in inner.items() if key in kind.__struct_fields__]
        if whole:
            raise document.problem(
                (key,), f"unknown key {key!r}", allowed=f"{' or '.join(whole)} (did you mean this?)", hint=f"--set {whole[0]}=VALUE, or the table in the file"
            )


_EXAMPLES = {
    "teacher": 'teacher = "model:teacher" or teacher = "teacher.onnx"',
    "data": '[data] with train, validation and test, for example train = "data:train"',
    "budget": "[budget] with latency_ms = 0.30",
    "student": '[student] with factory = "model:make_net" and choices = { width = [8, 16] }, or fixed = "model:net"',
}
