"""The half of the runner that knows ONNX Runtime; it is pushed to devices beside `runner.py`, which loads it (see `open_backend` there)."""

from __future__ import annotations

import json
import re
import statistics
from typing import Any


class Backend:
    """ONNX Runtime on the CPU provider, 1.16 or newer."""

    def __init__(self, job: dict[str, Any]) -> None:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        self.ort, self.job, self.version = onnxruntime, job, str(onnxruntime.__version__)
        self.errors = tuple(item for item in vars(state).values() if isinstance(item, type) and issubclass(item, Exception))

    def load(self, model: str, profile_prefix: str | None = None) -> None:
        """Create the session; `inputs`, `outputs` and `run` exist afterwards."""
        options = self.ort.SessionOptions()
        options.intra_op_num_threads = self.job["threads"]
        options.inter_op_num_threads = 1
        options.graph_optimization_level = self.ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self.job["options"].get("spinning", True) else "0")
        if profile_prefix is not None:
            options.enable_profiling = True
            options.profile_file_prefix = profile_prefix
        self.session = self.ort.InferenceSession(model, sess_options=options, providers=["CPUExecutionProvider"])
        self.inputs = [(item.name, item.shape) for item in self.session.get_inputs()]
        self.outputs = [item.name for item in self.session.get_outputs()]
        self.run = self.session.run

    def op_table(self, runs: int) -> list[dict[str, Any]]:
        """Median times per node over the last `runs` inferences."""
        with open(self.session.end_profiling(), encoding="utf-8") as stream:
            return op_table(json.load(stream), runs)

    @staticmethod
    def failing_operator(message: str) -> str:
        """The operator that an ONNX Runtime message complains about, or an empty text."""
        match = re.search(r"implementation for ([\w.:]+)\(|Fatal error: (?:[\w.]*:)?(\w+)\(|No Op registered for (\w+)", message)
        return next(filter(None, match.groups()), "") if match else ""


def op_table(events: list[dict[str, Any]], runs: int) -> list[dict[str, Any]]:
    """Median nanoseconds per node over its last `runs` kernel times, in execution order, from ONNX Runtime's profile (microseconds)."""
    nodes: dict[tuple[Any, ...], list[int]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            args = event.get("args", {})
            key = (event["name"][: -len("_kernel_time")], args.get("op_name", ""), args.get("provider", ""), args.get("node_index", ""))
            nodes.setdefault(key, []).append(event["dur"])
    return [
        {"name": name, "op_type": op_type, "provider": provider, "time_ns": int(statistics.median(times[-runs:]) * 1000)}
        for (name, op_type, provider, _), times in nodes.items()
    ]
