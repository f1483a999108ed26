"""Records a small table of real latencies and accuracies, on which search strategies are compared without a device.

    python benchmarks/record_table.py tests/data/recorded_table.json

A family of small convolutional nets on scikit-learn's handwritten digits (8 x 8). Each member is exported to ONNX (converter
`onnx-from-torch`), quantized (`qdq-from-onnx`) and timed at batch 1 with ONNX Runtime on one thread: all members are
visited in every round, in a seeded order; the latency is the 10th percentile over all inferences, its scatter the standard
deviation of the log of that percentile over rounds. Each member is trained twice for a few epochs; the accuracy is the mean
on the other half of the data.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import nn

from edgekd import registry
from edgekd.contracts import CalibrationSet, ConvertRequest, Infer
from edgekd.identity.keys import array_hash
from edgekd.records import CalibrationSpec, IOSpec, QuantRecipe, TensorSpec
from edgekd.search import count_size
from edgekd.storage import write_atomic
from edgekd.target import connect

CHOICES = {"width": [4, 8, 12, 16, 20, 24, 32], "depth": [1, 2, 3], "kernel": [3, 5]}
ROUNDS = 15
INFERENCES = 60
EPOCHS = 6
SEEDS = (0, 1)


def make_net(width: int, depth: int, kernel: int) -> nn.Module:
    """A stem, `depth` blocks of the same width, average pooling and ten logits."""
    layers: list[nn.Module] = [nn.Conv2d(1, width, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4 * width, 10))


def train(net: nn.Module, x: torch.Tensor, y: torch.Tensor, seed: int) -> None:
    """SGD with momentum and a one-cycle schedule."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    steps = EPOCHS * (len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
    for _ in range(EPOCHS):
        order = torch.randperm(len(x), generator=generator)
        for start in range(0, len(x) // 64 * 64, 64):
            rows = order[start : start + 64]
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()


def accuracy(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """The share of right answers."""
    net.eval()
    with torch.no_grad():
        return float((net(x).argmax(1) == y).float().mean())


def export(net: nn.Module, folder: Path, images: np.ndarray, infer: Infer) -> dict[str, Path]:
    """The float and the int8 file of a net, by precision."""
    iospec = IOSpec(
        inputs=(TensorSpec(name="image", dtype="float32", shape=("batch", 1, 8, 8)),),
        outputs=(TensorSpec(name="output", dtype="float32", shape=("batch", 10)),),
    )
    example = {"image": images[:2]}
    float_model = registry.load("converters", "onnx-from-torch")().convert(ConvertRequest(source=net, folder=folder / "fp32", iospec=iospec, example=example))
    inputs = {"image": images[:64]}
    digest = array_hash(inputs)
    recipe = QuantRecipe(scheme="u8s8", calibration=CalibrationSpec(method="minmax", size=64, split="train", data_hash=digest))
    request = ConvertRequest(
        source=float_model,
        folder=folder / "int8",
        iospec=float_model.record.iospec,
        example=example,
        recipe=recipe,
        calibration=CalibrationSet(inputs=inputs, split="train", data_hash=digest),
        infer=infer,
    )
    quantized = registry.load("converters", "qdq-from-onnx")().convert(request)
    return {"fp32": float_model.entry, "int8": quantized.entry}


def measure(files: dict[tuple[int, str], Path], image: np.ndarray) -> dict[tuple[int, str], tuple[float, float]]:
    """The 10th percentile in milliseconds and the scatter of its log over rounds, for every file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    sessions = {key: onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]) for key, path in files.items()}
    feed = {"image": image}
    seen: dict[tuple[int, str], list[np.ndarray]] = {key: [] for key in files}
    order = list(files)
    shuffler = random.Random(0)
    for _ in range(ROUNDS):
        shuffler.shuffle(order)
        for key in order:
            session, samples = sessions[key], np.empty(INFERENCES)
            for _ in range(15):
                session.run(None, feed)
            for index in range(INFERENCES):
                start = time.perf_counter_ns()
                session.run(None, feed)
                samples[index] = time.perf_counter_ns() - start
            seen[key].append(samples)
    return {
        key: (float(np.percentile(np.concatenate(rounds), 10)) / 1e6, float(np.std([np.log(np.percentile(samples, 10)) for samples in rounds], ddof=1)))
        for key, rounds in seen.items()
    }


def cpu_model() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return names[0] if names else platform.machine()


def main() -> None:
    """Record the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    torch.set_num_threads(1)
    digits = load_digits()
    images = (digits.images / 16.0).astype(np.float32)[:, None]
    order = np.random.default_rng(0).permutation(len(images))
    x, y = torch.from_numpy(images[order]), torch.from_numpy(digits.target[order])
    half = len(x) // 2
    members: list[dict[str, Any]] = [dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())]
    rows: list[dict[str, Any]] = []
    files: dict[tuple[int, str], Path] = {}
    with TemporaryDirectory() as temporary, connect("null") as host:  # calibration runs on the host; nothing is timed there
        for number, member in enumerate(members):
            scores = []
            for seed in SEEDS:
                torch.manual_seed(seed)
                net = make_net(**member)
                train(net, x[:half], y[:half], seed)
                scores.append(accuracy(net, x[half:], y[half:]))
            size = count_size(net, {"image": images[:1]})
            for precision, path in export(net, Path(temporary) / str(number), x[:half].numpy(), host.runtime.infer).items():
                files[number, precision] = path
            rows.append({"choices": member, "parameters": size.parameters, "macs": size.macs, "accuracy": round(float(np.mean(scores)), 5)})
            print(f"{number + 1}/{len(members)} {member} accuracy {rows[-1]['accuracy']:.4f}", flush=True)
        for (number, precision), (latency, scatter) in measure(files, images[:1]).items():
            rows[number][f"latency_ms_{precision}"] = round(latency, 6)
            rows[number][f"scatter_{precision}"] = round(scatter, 5)
    conditions = {
        "device": cpu_model(),
        "runtime": f"onnxruntime {onnxruntime.__version__}, 1 thread, batch 1",
        "latency": f"10th percentile of {ROUNDS} x {INFERENCES} inferences, interleaved, one process",
        "accuracy": f"mean of {len(SEEDS)} trainings of {EPOCHS} epochs, {len(x) - half} digits",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    write_atomic(output, (json.dumps({"choices": CHOICES, "conditions": conditions, "rows": rows}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
