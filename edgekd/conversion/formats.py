"""The format graph: formats as nodes, registered converters as edges, and the roads between them, best first."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from edgekd import registry
from edgekd.conversion.environments import create_line, environment_state, known_environments
from edgekd.errors import ConfigError, RegistryError, near_names
from edgekd.records import Format, Precision

TORCH = "torch"
FORMATS: Mapping[str, str] = {
    TORCH: "a torch.nn.Module",
    Format.ONNX.value: "an .onnx file",
    Format.SAVED_MODEL.value: "a folder with saved_model.pb",
    Format.KERAS.value: "a .keras file",
    Format.TFLITE.value: "a .tflite file",
}
"""Every format that a road may pass, and what it is on disk. A TensorRT engine is none: the target compiles it from an ONNX file."""

HOST_PROFILES: Mapping[str, str] = {Format.ONNX.value: "local", Format.TFLITE.value: "litert-local"}
"""Format to the profile whose runtime executes it on the host; the others cannot be run there."""

MAX_HOPS = 5
_DEFAULT_COST_S = 10.0
_OPTION = str | int | float | bool


@dataclass(frozen=True)
class Edge:
    """One converter in one precision. `cost_s` is a rough order of magnitude in seconds that ranks roads, no measurement.

    `environment` is the name of the `edgekd env` that it runs in, or empty; `here` is a module that makes the environment superfluous
    where it can be imported. `needs` maps the modules that it imports to the extra that installs each; `options` ask for the precision.
    `follows` names the converters whose files it takes best, where it does not start the road.
    """

    converter: str
    source: str
    target: str
    precision: Precision
    environment: str = ""
    here: str = ""
    needs: Mapping[str, str] = field(default_factory=dict)
    cost_s: float = _DEFAULT_COST_S
    options: Mapping[str, _OPTION] = field(default_factory=dict)
    follows: tuple[str, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether format or precision change; an edge that prepares a model only is taken only if `via` names it."""
        return self.source != self.target or self.precision is not Precision.FP32

    def uses_environment(self, environments: Path | None = None) -> bool:
        """Whether it runs in an environment of its own on this machine. `environments`, a folder, asks for that."""
        return bool(self.environment) and not (environments is None and self.here and _importable(self.here))

    def missing(self, environments: Path | None = None) -> tuple[str, ...]:
        """The lines that make this edge usable here, none if it is. Nothing is imported and nothing is run."""
        lines = [f'pip install "edgekd[{extra}]"' if extra else f"pip install {module}" for module, extra in self.needs.items() if not _importable(module)]
        if self.uses_environment(environments):
            known = known_environments()
            if self.environment not in known:
                lines.append(f"the environment {self.environment!r}, which this edgekd cannot make")
            else:
                state = environment_state(known[self.environment], environments)
                if state.state != "ready":
                    lines.append(state.remedy or create_line(self.environment, environments))
        return tuple(dict.fromkeys(lines))


@dataclass(frozen=True)
class Route:
    """Converters in the order in which they run."""

    source: str
    edges: tuple[Edge, ...]

    @property
    def converters(self) -> tuple[str, ...]:
        """The names of the converters, in order."""
        return tuple(edge.converter for edge in self.edges)

    @property
    def cost_s(self) -> float:
        """The sum of the edges' rough costs, in seconds."""
        return sum(edge.cost_s for edge in self.edges)

    @property
    def formats(self) -> tuple[str, ...]:
        """Every format that it passes, source first."""
        return (self.source, *(edge.target for edge in self.edges))

    def missing(self, environments: Path | None = None) -> tuple[str, ...]:
        """The lines that make the road usable here, none if it is."""
        return tuple(dict.fromkeys(line for edge in self.edges for line in edge.missing(environments)))

    def __str__(self) -> str:
        steps = (f" --{edge.converter}--> {edge.target} {edge.precision.value}" for edge in self.edges)
        return self.source + "".join(steps)


@dataclass(frozen=True)
class FormatGraph:
    """Every edge that the registered converters give; `broken` are converters that give none, and why."""

    edges: tuple[Edge, ...]
    broken: Mapping[str, str]

    @cached_property
    def _leaving(self) -> Mapping[str, tuple[Edge, ...]]:
        return {name: tuple(edge for edge in self.edges if edge.source == name) for name in FORMATS}

    def routes(self, source: str, target: str, precision: Precision | str = Precision.FP32, via: Sequence[str] = ()) -> tuple[Route, ...]:
        """All sensible roads from a float model in `source`, best first; see `routes`."""
        wanted = check_ends(source, target, precision)
        self._check_via(via)
        found = [Route(source, edges) for edges in self._walk(source, target, wanted, via, ()) if edges and _passes(edges, via)]
        return tuple(sorted(found, key=_rank))

    def _walk(self, here: str, target: str, wanted: Precision, via: Sequence[str], taken: tuple[Edge, ...]) -> Iterator[tuple[Edge, ...]]:
        """Every way on from a float model in the format `here`: no format is left twice, and what is not float any more goes no further."""
        if here == target and wanted is Precision.FP32:
            yield taken
        if len(taken) >= MAX_HOPS:
            return
        left = {edge.source for edge in taken if edge.source != edge.target}
        for edge in self._leaving[here]:
            if edge.precision is not Precision.FP32:
                if edge.target == target and edge.precision is wanted:
                    yield (*taken, edge)
            elif not edge.changes:
                if edge.converter in via and edge not in taken:
                    yield from self._walk(here, target, wanted, via, (*taken, edge))
            elif edge.target not in left:
                yield from self._walk(edge.target, target, wanted, via, (*taken, edge))

    def _check_via(self, via: Sequence[str]) -> None:
        known = {*FORMATS, *(edge.converter for edge in self.edges)}
        for name in via:
            if name in self.broken:
                raise ConfigError(f"the converter {name!r} in via cannot be used", found=self.broken[name], hint="repair or remove its package", subject=name)
            if name not in known:
                raise ConfigError(f"via names neither a converter nor a format: {name!r}", found=name, allowed=near_names(name, known), subject=name)

    def no_route(self, source: str, target: str, precision: Precision, via: Sequence[str] = ()) -> ConfigError:
        """The error that no road exists: it lists which end in the format, and what they start from."""
        into = [edge for edge in self.edges if edge.target == target and edge.changes]
        reach = sorted({f"{edge.target} {edge.precision.value}" for route in self._all_from(source) for edge in route[-1:]})
        parts = [f"from {source}: {', '.join(reach) or 'nothing'}"]
        parts.append(f"to {target}: {', '.join(sorted({f'{edge.source} by {edge.converter} ({edge.precision.value})' for edge in into})) or 'no converter'}")
        if self.broken:
            parts.append(f"not usable: {', '.join(f'{name} ({why})' for name, why in sorted(self.broken.items()))}")
        without = self.routes(source, target, precision) if via else ()
        hint = (
            f"leave out via: {without[0]}" if without else "take another format or precision, or register a converter under the entry point edgekd.converters"
        )
        ends = f"from {source} to {target} in {precision.value}" + (f" via {', '.join(via)}" if via else "")
        return ConfigError(f"there is no road {ends}", allowed="; ".join(parts), hint=hint, subject=target)

    def _all_from(self, source: str) -> Iterator[tuple[Edge, ...]]:
        for target in FORMATS:
            for precision in Precision:
                yield from (edges for edges in self._walk(source, target, precision, (), ()) if edges)


def _passes(edges: Sequence[Edge], via: Sequence[str]) -> bool:
    """Whether the edges pass the names in `via` (converters, or formats that are reached) in their order."""
    position = 0
    for name in via:
        at = next((index for index in range(position, len(edges)) if edges[index].converter == name or edges[index].target == name), None)
        if at is None:
            return False
        position = at + (edges[at].converter == name)
    return True


def _rank(route: Route) -> tuple[int, int, int, float, tuple[str, ...]]:
    """Fewer hops, then fewer files that a converter takes badly, then fewer environments of their own, then the rough cost, then names."""
    badly = sum(bool(edge.follows) and before.converter not in edge.follows for before, edge in itertools.pairwise(route.edges))
    return (len(route.edges), badly, sum(edge.uses_environment() for edge in route.edges), route.cost_s, route.converters)


def check_ends(source: str, target: str, precision: Precision | str) -> Precision:
    """The precision, after making sure that both formats are known.

    Raises:
        ConfigError: a format or the precision is unknown, or the target is a TensorRT engine.
    """
    if target == Format.TENSORRT.value:
        raise ConfigError(
            "a TensorRT engine is compiled on its device, not converted on the host",
            found=target,
            allowed=", ".join(FORMATS),
            hint="convert to onnx; a target whose runtime is TensorRT compiles that file",
            subject=target,
        )
    for name in (source, target):
        if name not in FORMATS:
            raise ConfigError(f"there is no format called {name!r}", found=name, allowed=near_names(name, FORMATS), subject=name)
    if target == TORCH:
        raise ConfigError("nothing is converted to a torch module", found=target, allowed=", ".join(name for name in FORMATS if name != TORCH), subject=target)
    names = [item.value for item in Precision]
    text = precision.value if isinstance(precision, Precision) else str(precision)
    if text not in names:
        raise ConfigError(f"there is no precision called {text!r}", found=text, allowed=near_names(text, names), subject=text)
    return Precision(text)


def load_graph() -> FormatGraph:
    """The graph of every converter that is registered now, those of other packages by entry points on equal terms.

    Edges are read from class attributes: `source`, `target`, `precisions`, and where a class has them `environment`, `environment_here`,
    `needs`, `cost_s`, `precision_options` and `follows` (see `contracts.Converter`).
    """
    edges: list[Edge] = []
    broken: dict[str, str] = {}
    for name in sorted(registry.table("converters")):
        try:
            edges += _edges_of(name)
        except RegistryError as error:
            broken[name] = f"{error.what}: {error.found}"
    return FormatGraph(tuple(edges), broken)


def _edges_of(name: str) -> list[Edge]:
    """The edges of one converter, one for each of its precisions."""
    kind = registry.load("converters", name)
    source: str = getattr(kind, "source", "")
    target: str = getattr(kind, "target", "")
    precisions: tuple[Precision, ...] = getattr(kind, "precisions", ())
    if source not in FORMATS or target not in FORMATS or target == TORCH or not precisions or not all(isinstance(item, Precision) for item in precisions):
        raise RegistryError(
            "its class attributes source, target and precisions do not make an edge",
            found=f"{source!r} -> {target!r}, {precisions!r}",
            allowed=f"formats {', '.join(FORMATS)}; a tuple of Precision",
            subject=name,
        )
    options = getattr(kind, "precision_options", {})
    return [
        Edge(
            converter=name,
            source=source,
            target=target,
            precision=precision,
            environment=getattr(kind, "environment", ""),
            here=getattr(kind, "environment_here", ""),
            needs=dict(getattr(kind, "needs", {})),
            cost_s=float(getattr(kind, "cost_s", _DEFAULT_COST_S)),
            options=dict(options.get(precision.value, {})),
            follows=tuple(getattr(kind, "follows", ())),
        )
        for precision in precisions
    ]


def routes(source: str, target: str, precision: Precision | str = Precision.FP32, via: Sequence[str] = ()) -> tuple[Route, ...]:
    """All sensible roads from a float model in the format `source` to `target` in `precision`, best first; none if there is none.

    Fewer hops go first, then files that the next converter takes well, then fewer environments of their own, then the lower rough cost.
    No road leaves a format twice; one that quantizes
    does so at its last hop. `via` names converters or formats that the road must pass, in this order, for example `("onnx",)`.

    Raises:
        ConfigError: an unknown format, precision or name in `via`. RegistryError: two packages want one name.
    """
    return load_graph().routes(source, target, precision, via)


def edges_table(graph: FormatGraph) -> str:
    """The edges as a Markdown table, one row per converter, sorted by formats."""
    rows = ["| from | to | converter | precisions | extra | environment |", "|---|---|---|---|---|---|"]
    order = list(FORMATS)
    grouped: dict[str, list[Edge]] = {}
    for edge in graph.edges:
        grouped.setdefault(edge.converter, []).append(edge)
    for name, edges in sorted(grouped.items(), key=lambda item: (order.index(item[1][0].source), order.index(item[1][0].target), item[0])):
        first = edges[0]
        extras = ", ".join(f"`{extra}`" for extra in sorted(set(first.needs.values()) - {""})) or "-"
        place = f"`{first.environment}`" + (f", or `{first.here}` here" if first.here else "") if first.environment else "-"
        rows.append(f"| {first.source} | {first.target} | `{name}` | {', '.join(edge.precision.value for edge in edges)} | {extras} | {place} |")
    return "\n".join(rows) + "\n"


def _importable(module: str) -> bool:
    """Whether a module at the top level is installed; it is not imported."""
    return importlib.util.find_spec(module.partition(".")[0]) is not None


__all__ = ["FORMATS", "HOST_PROFILES", "Edge", "FormatGraph", "Route", "check_ends", "edges_table", "load_graph", "routes"]
