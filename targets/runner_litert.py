"""The half of the runner that knows TFLite files; it is pushed to devices beside `runner.py`, which loads it (see `open_backend` there)."""

from __future__ import annotations

import difflib
import importlib
import re
from typing import Any

PACKAGES = ("ai_edge_litert", "tflite_runtime")
"""Packages with an `interpreter`, the preferred one first."""

PER_CHANNEL_HYBRID = "per-channel int8 weights with float inputs"

KNOWN_BAD: tuple[dict[str, Any], ...] = (
    {
        "package": "tflite_runtime", "below": (2, 15), "operator": "FULLY_CONNECTED", "kind": PER_CHANNEL_HYBRID,
        "reason": "it ignores the scales of the channels and gives wrong numbers without an error (2.14.0 gives zeros)",
    },
)  # fmt: skip
"""What a package computes wrongly without saying so; a model with such an operator is refused."""


class Refused(RuntimeError):
    """A model that would run, but not as meant."""


class Backend:
    """LiteRT's interpreter on the CPU with its default delegate (XNNPACK), else that of `tflite_runtime`.

    Inputs and outputs are named as in the file's first signature, or as its tensors where there is none. With `taps` in the job,
    all inner tensors are kept and the delegate is off. `run` with names gives quantized tensors as real numbers; without names it
    gives the bytes of the file's types, as an application reads them.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        found, missing = None, ""
        for package in PACKAGES:
            try:
                found = importlib.import_module(package + ".interpreter")
            except ImportError as error:
                missing += f"{package}: {error}; "
                continue
            except (AttributeError, SystemError) as error:  # built for another numpy
                raise ImportError(f"{package} does not fit the numpy of the device (tflite_runtime needs numpy<2): {error}") from error
            break
        if found is None:
            raise ImportError(missing)
        self.lib, self.package, self.job = found, package, job
        self.version = str(importlib.import_module(package).__version__)
        self.about = {"package": package.replace("_", "-")}
        self.errors = (RuntimeError, ValueError, TypeError)

    def load(self, model: str, profile_prefix: str | None = None) -> None:
        """Create the interpreter; `inputs`, `outputs` and `run` exist afterwards, and `facts`: nodes, delegate partitions, operators outside them."""
        taps = self.job.get("taps", [])
        kind = self.lib.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES if taps else self.lib.OpResolverType.AUTO
        self.interpreter = made = self.lib.Interpreter(
            model_path=model, num_threads=self.job["threads"], experimental_op_resolver_type=kind, experimental_preserve_all_tensors=bool(taps)
        )
        tensors = {item["index"]: item for item in made.get_tensor_details()}
        self._refuse_known_bad(made, tensors)
        made.allocate_tensors()
        feeds, gives = made.get_input_details(), made.get_output_details()
        tensors.update({item["index"]: item for item in [*feeds, *gives]})
        self._feeds, self._gives = {item["name"]: item["index"] for item in feeds}, {item["name"]: item["index"] for item in gives}
        signatures = made.get_signature_list()
        if signatures:
            first = made.get_signature_runner(next(iter(signatures)))
            named = [{name: item["index"] for name, item in group.items()} for group in (first.get_input_details(), first.get_output_details())]
            if set(named[0].values()) != set(self._feeds.values()) or not set(named[1].values()) <= set(self._gives.values()):
                raise Refused(f"the signature {next(iter(signatures))!r} is not of the model's first graph; found {sorted(named[0])}")
            self._feeds, self._gives = named
        self._tensors, self._sizes = tensors, {index: tuple(tensors[index]["shape"]) for index in self._feeds.values()}
        self._open = any(-1 in tensors[index]["shape_signature"] for index in self._feeds.values())
        self.inputs = [(name, shape_of(tensors[index])) for name, index in self._feeds.items()]
        self.outputs = list(self._gives)
        self._order = list(self._gives.values())
        inner = {item["name"]: index for index, item in tensors.items() if item["name"] not in self._gives}
        for tap in taps:
            for name in [tap] if tap in inner else difflib.get_close_matches(tap, list(inner)):
                self._gives.setdefault(name, inner[name])
        self.outputs = list(self._gives)
        self.facts = partitions(made._get_ops_details())

    def _refuse_known_bad(self, made: Any, tensors: dict[int, Any]) -> None:
        version = tuple(int(word) for word in re.findall(r"\d+", self.version)[:2])
        rows = [row for row in KNOWN_BAD if row["package"] == self.package and version < row["below"]]
        if not rows:
            return
        for op in made._get_ops_details():
            for row in rows:
                if op["op_name"] == row["operator"] and row["kind"] in kinds_of(op, tensors):
                    raise Refused(f"{self.package} {self.version} refused for {op['op_name']} with {row['kind']}: {row['reason']}")

    def run(self, names: list[str] | None, feed: dict[str, Any]) -> list[Any]:
        """One inference: inputs copied in, outputs copied out."""
        made = self.interpreter
        if self._open:
            self._resize(feed)
        for name, index in self._feeds.items():
            made.set_tensor(index, feed[name])
        made.invoke()
        if names is None:
            return [made.get_tensor(index) for index in self._order]
        return [real_numbers(made.get_tensor(self._gives[name]), self._tensors[self._gives[name]]) for name in names]

    def _resize(self, feed: dict[str, Any]) -> None:
        changed = [(name, index) for name, index in self._feeds.items() if self._sizes[index] != feed[name].shape]
        for name, index in changed:
            self.interpreter.resize_tensor_input(index, feed[name].shape, strict=True)
            self._sizes[index] = feed[name].shape
        if changed:
            self.interpreter.allocate_tensors()

    def op_table(self, runs: int) -> list[dict[str, Any]]:
        """Not there: the interpreter of the Python package has no profiler."""
        raise Refused("the interpreter of the Python package has no profiler")

    @staticmethod
    def failing_operator(message: str) -> str:
        """The operator that a message of the interpreter complains about, or an empty text."""
        match = re.search(r"refused for (\w+)|custom op: (\w+)|builtin op: (\w+)|opcode '?(\w+)'?|[Nn]ode number \d+ \(([\w.]+)\)", message)
        return next(filter(None, match.groups()), "") if match else ""


def shape_of(tensor: dict[str, Any]) -> list[Any]:
    """The sizes of an input; a text for an open axis."""
    asked, sizes = list(tensor["shape_signature"]), list(tensor["shape"])
    return [f"axis{at}" if len(asked) == len(sizes) and asked[at] < 0 else int(size) for at, size in enumerate(sizes)]


def real_numbers(array: Any, tensor: dict[str, Any]) -> Any:
    """The values of a tensor; those of one quantized as a whole as float32."""
    found = tensor["quantization_parameters"]
    if len(found["scales"]) != 1 or array.dtype.kind not in "iu":
        return array
    return (array.astype("float32") - found["zero_points"][0].astype("float32")) * found["scales"][0].astype("float32")


def kinds_of(op: dict[str, Any], tensors: dict[int, Any]) -> set[str]:
    """What is known to go wrong of the kinds in which an operator computes."""
    used = [tensors[index] for index in op["inputs"][:2] if index in tensors]
    hybrid = len(used) == 2 and [item["dtype"].__name__ for item in used] == ["float32", "int8"]
    return {PER_CHANNEL_HYBRID} if hybrid and len(used[1]["quantization_parameters"]["scales"]) > 1 else set()


def partitions(ops: list[dict[str, Any]]) -> dict[str, Any]:
    """`nodes` of the file, `partitions` that a delegate took, and `outside`: operator to how many the delegate left.

    A delegate's node stands beside those that it replaces; these are found by walking from its outputs to its inputs.
    """
    own = [op for op in ops if op["op_name"] != "DELEGATE"]
    producers = {int(index): op for op in own for index in op["outputs"]}
    taken: set[int] = set()
    delegates = [op for op in ops if op["op_name"] == "DELEGATE"]
    for delegate in delegates:
        fence, waiting, seen = {int(index) for index in delegate["inputs"]}, [int(index) for index in delegate["outputs"]], set()
        while waiting:
            index = waiting.pop()
            if index in fence or index in seen or index not in producers:
                continue
            seen.add(index)
            taken.add(producers[index]["index"])
            waiting.extend(int(item) for item in producers[index]["inputs"])
    outside: dict[str, int] = {}
    for op in own:
        if op["index"] not in taken:
            outside[op["op_name"]] = outside.get(op["op_name"], 0) + 1
    return {"nodes": len(own), "partitions": len(delegates), "outside": outside}
