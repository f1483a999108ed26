"""The null runtime: needs no device, makes latencies up from the graph, computes real outputs, and always says that it is simulated."""

from __future__ import annotations

import importlib.util
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Array, BenchmarkRequest, Tensors, Transport
from edgekd.errors import DataError, MissingDependency, ModelError, ProfileError, UnsupportedModel, near_names
from edgekd.records import Capabilities, Clock, Fingerprint, Format, Launch, OpTime, Precision, Profile, Snapshot, SupportReport
from edgekd.storage import sha256_bytes
from edgekd.teachers import ort_errors

from ._models import compared_names, fitting_request, in_sequence, out_of_sequence, output_names, refused_record, tap, with_state
from .null_costs import CHANNEL_STEPS, FORMULA_VERSION, GraphCost, graph_cost

_OPTIONS: dict[str, tuple[float, str]] = {
    "noise": (0.01, "0 to 0.5: spread of launches, as the standard deviation of the log; samples spread twice as much"),
    "speed": (1.0, "above 0: how many times faster than the formula"),
    "seed": (0, "integer from 0: seed of the noise"),
}
_SENTINEL_NS = 1_000_000
_MAX_SESSIONS = 8
_STILL = Snapshot(
    load_1m=0.0,
    frequency_mhz=1000.0,
    governor="null",
    temperature_c=40.0,
    steal_share=0.0,
    power_mode="null",
    sentinel_ns=_SENTINEL_NS,
    available_mb=1024.0,
)


class NullRuntime:
    """A runtime whose latencies are made up (`null_costs`) and whose outputs are real (ONNX Runtime on the host, one thread).

    Options of the profile, under `runtime.options`: `noise`, `speed` and `seed`. The noise depends on the seeds, the label,
    the graph's structure, the launch's index and what is read of the protocol only, so that a repeated run is equal to the byte.
    """

    name = "null"

    def __init__(self, profile: Profile, transport: Transport) -> None:
        self.profile = profile
        self.transport = transport
        self._costs: dict[str, GraphCost] = {}
        self._sessions: dict[tuple[str, tuple[str, ...]], Any] = {}

    def open(self) -> None:
        """Check the options and the packages.

        Raises:
            ProfileError: an unknown option, or a value out of range.
            MissingDependency: onnx or onnxruntime is not installed.
        """
        for key, value in self.profile.runtime.options.items():
            if key not in _OPTIONS:
                raise ProfileError(f"the null runtime has no option {key!r}", found=key, allowed=near_names(key, _OPTIONS), subject=f"runtime.options.{key}")
            number = not isinstance(value, str | bool) and math.isfinite(value)
            ranges = {"noise": lambda x: 0 <= x <= 0.5, "speed": lambda x: x > 0, "seed": lambda x: x >= 0 and x == int(x)}
            if not number or not ranges[key](value):
                raise ProfileError(
                    f"the null runtime's option {key!r} is out of range", found=value, allowed=_OPTIONS[key][1], subject=f"runtime.options.{key}"
                )
        for package in ("onnx", "onnxruntime"):
            if importlib.util.find_spec(package) is None:
                raise MissingDependency(package, "x86", purpose="the null runtime")

    def close(self) -> None:
        """Drop what was loaded."""
        self._costs.clear()
        self._sessions.clear()

    def capabilities(self) -> Capabilities:
        """What the null runtime can do: ONNX in fp32 and int8, taps, op times; simulated."""
        return Capabilities(
            formats=(Format.ONNX,),
            precisions=(Precision.INT8, Precision.FP32),
            schemes=("u8s8",),
            channel_steps=dict(CHANNEL_STEPS),
            clocks=(Clock.END_TO_END, Clock.INIT, Clock.FIRST),
            taps=True,
            op_times=True,
            state=True,
            simulated="null",
        )

    def fingerprint(self) -> Fingerprint:
        """No device: the formula's version and options stand for one, and the host's architecture, where outputs are computed."""
        return Fingerprint(
            fields={
                "cpu_model": "null",
                "isa": "none",
                "machine": platform.machine(),
                "runtime": self.name,
                "runtime_version": FORMULA_VERSION,
                "threads": str(self.profile.runtime.threads),
                **{key: f"{self._option(key):g}" for key in _OPTIONS},
            }
        )

    def snapshot(self) -> Snapshot:
        """A device at rest, always the same."""
        return _STILL

    def supports(self, model: StoredArtifact) -> SupportReport:
        """Whether ONNX Runtime makes a session of the model; text inputs are named as missing."""
        refused = refused_record(model.record)
        if refused is not None:
            return refused
        try:
            session = self._session(model, ())
        except UnsupportedModel as error:
            return SupportReport(supported=False, missing={"model": str(error.found)}, note=error.what)
        return compared_names(model.record, [item.name for item in session.get_inputs()], [item.name for item in session.get_outputs()])

    def compile(self, model: StoredArtifact, folder: Path) -> StoredArtifact:
        """The same files in `folder`: nothing is compiled."""
        return model if folder.resolve() == model.folder.resolve() else model.copy_to(folder)

    def benchmark(self, request: BenchmarkRequest) -> tuple[Launch, ...]:
        """Made-up launches with `min_samples` samples each, at once and without a process.

        Raises:
            ConfigError: the schedule is empty or names a label without a model or inputs.
            DataError: the inputs of a label lack one that its model takes, or hold no sample.
            ModelError: a model is no ONNX graph.
        """
        fitting_request(request)
        return tuple(self._launch(request, label, request.first_index + offset) for offset, label in enumerate(request.schedule))

    def true_latency_ms(self, model: StoredArtifact, percentile: float = 50.0) -> float:
        """The latency in milliseconds that launches scatter around: the median over launches of this percentile within a launch.

        Samples are log-normal, so the percentile is `median * exp(2 * noise * z)` with the normal quantile `z`.
        """
        spread = 2.0 * self._option("noise") * NormalDist().inv_cdf(percentile / 100.0)
        return self._base_ns(model) * math.exp(spread) / 1e6

    def infer(self, model: StoredArtifact, inputs: Tensors, taps: Sequence[str] = ()) -> dict[str, Array]:
        """Real outputs for all samples, `(samples, ...)`, and the tapped tensors, by ONNX Runtime on the host with one thread.

        Samples run one by one where the first axis is 1 or symbolic, else in batches of that size. A tensor without a batch
        axis gets one.

        Raises:
            DataError: an input is missing or no number, counts differ, or the samples do not fill the batches.
            ModelError: a tap is no tensor of the graph, or the model does not run with these inputs.
            UnsupportedModel: ONNX Runtime refuses the model.
        """
        feeds, steps = in_sequence(model, inputs)
        session = self._session(model, tuple(taps))
        names = output_names(model, taps)
        fixed = {shape[0] for item in model.record.iospec.inputs if (shape := item.shape)}
        chunk = max((size for size in fixed if isinstance(size, int)), default=1)
        samples = max(map(len, feeds.values()))
        if samples % chunk:
            raise DataError(
                "the samples do not fill the model's batches", found=samples, allowed=f"a multiple of the batch {chunk}", subject=model.record.entry
            )
        parts: dict[str, list[Array]] = {name: [] for name in names}
        pairs = {pair.input: pair.output for pair in model.record.iospec.state} if steps else {}
        held: dict[str, Array] = {}
        for start in range(0, samples, chunk):
            if not steps or start % steps == 0:
                held = {name: feeds[name] for name in pairs}
            feed = {name: value[start : start + chunk] for name, value in feeds.items() if name not in pairs} | held
            found = dict(zip(names, map(np.asarray, _run(session, names, feed)), strict=True))
            held = {name: found[output] for name, output in pairs.items()}
            for name, part in found.items():
                parts[name].append(part if part.ndim and part.shape[0] == chunk else part[None])
        return out_of_sequence({name: np.concatenate(items) for name, items in parts.items()}, steps)

    def op_times(self, model: StoredArtifact, inputs: Tensors, runs: int = 50) -> tuple[OpTime, ...]:
        """The formula's time of every operator that runs, in the order of the graph."""
        with_state(model, inputs)
        times = [(node, round(node.time_ns / self._option("speed"))) for node in self._cost(model).nodes]
        whole = sum(time_ns for _, time_ns in times) or 1
        return tuple(OpTime(name=node.name, op_type=node.op_type, time_ns=time_ns, share=time_ns / whole, provider="null") for node, time_ns in times)

    def _option(self, name: str) -> float:
        return float(self.profile.runtime.options.get(name, _OPTIONS[name][0]))

    def _cost(self, model: StoredArtifact) -> GraphCost:
        key = model.record.content_hash()
        if key not in self._costs:
            model.verify()
            self._costs[key] = graph_cost(model.entry, model.record.iospec.static_binding)
        return self._costs[key]

    def _base_ns(self, model: StoredArtifact) -> float:
        return self._cost(model).total_ns / self._option("speed")

    def _launch(self, request: BenchmarkRequest, label: str, index: int) -> Launch:
        model = request.models[label]
        cost, base = self._cost(model), self._base_ns(model)
        noise = self._option("noise")
        read = (request.protocol.min_samples, request.protocol.warmup_min_s)  # no other field: one that is new must draw no other noise
        key = repr((int(self._option("seed")), request.seed, label, cost.structure, read, index))
        random = np.random.default_rng(int(sha256_bytes(key.encode())[:16], 16))
        factor = math.exp(noise * random.standard_normal())
        samples = base * factor * np.exp(2.0 * noise * random.standard_normal(request.protocol.min_samples))
        warmup = request.protocol.warmup_min_s
        return Launch(
            label=label,
            index=index,
            samples_ns=tuple(int(value) for value in np.rint(samples)),
            init_ns=round((2e6 + 1e5 * len(cost.nodes) + 0.5 * cost.parameters) * factor / self._option("speed")),
            first_ns=round(2.0 * base * factor),
            warmup_runs=max(1, math.ceil(warmup * 1e9 / base)),
            warmup_s=warmup,
            warmup_drift=0.0,
            cpu_share=1.0,
            switches_per_s=0.0,
            peak_memory_bytes=20_000_000 + 4 * cost.parameters + cost.activation_bytes,
            before=_STILL,
            after=_STILL,
        )

    def _session(self, model: StoredArtifact, taps: tuple[str, ...]) -> Any:
        key = (model.record.content_hash(), taps)
        if key not in self._sessions:
            while len(self._sessions) >= _MAX_SESSIONS:
                del self._sessions[next(iter(self._sessions))]
            model.verify()
            self._sessions[key] = _open_session(model.entry, taps)
        return self._sessions[key]


def _run(session: Any, names: list[str], feed: dict[str, Array]) -> list[Any]:
    try:
        outputs: list[Any] = session.run(names, feed)
    except ort_errors() as error:
        raise ModelError("the model does not run with these inputs", found=str(error).splitlines()[0], hint="compare shapes with the model's IOSpec") from error
    return outputs


def _open_session(path: Path, taps: tuple[str, ...]) -> Any:
    """An ONNX Runtime session on one thread, with the taps added to the graph's outputs.

    Nothing is fused: int8 is computed in float between its pairs, so that no processor's int8 kernels decide the outputs (those of an x86 without
    VNNI saturate).
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    source: str | bytes = str(path)
    if taps:
        model = onnx.load(str(path))
        tap(model, taps)
        source = model.SerializeToString()
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except ort_errors() as error:
        raise UnsupportedModel(
            f"ONNX Runtime refuses {path.name}", found=str(error).splitlines()[0], hint="export it with another opset", subject=path.name
        ) from error
