"""Records what every road makes of the golden networks now: `make goldens`. With `--train` the networks are trained anew, too.

Run it after moving a version in constraints.txt, and read the difference before committing it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.golden.golden_kit import (
    ANDROID,
    HERE,
    LIBRARIES,
    NETWORKS,
    RECORD,
    ROADS,
    SEED,
    STORED,
    build,
    digits,
    is_exact,
    load_record,
    measure,
    signal_db,
    versions,
    weights_of,
)

_EPOCHS, _BATCH = 30, 64


def train(name: str) -> None:
    """Train a network on the digits, and store its weights."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    module, data = NETWORKS[name](), digits()
    images, labels = torch.from_numpy(data.train), torch.from_numpy(data.train_labels)
    optimizer = torch.optim.Adam(module.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=_EPOCHS * (len(images) // _BATCH + 1))
    for _ in range(_EPOCHS):
        for picks in torch.split(torch.randperm(len(images)), _BATCH):
            optimizer.zero_grad()
            loss: Any = torch.nn.functional.cross_entropy(module(images[picks]), labels[picks])
            loss.backward()
            optimizer.step()
            schedule.step()
    save_file(module.state_dict(), weights_of(name))


def main() -> None:
    """Write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="train the networks anew; without it their stored weights are used")
    parser.add_argument("--road", action="append", choices=list(ROADS), help="record this road only, and keep what is recorded of the others; may be repeated")
    given = parser.parse_args()
    roads = given.road or list(ROADS)
    if inexact := [road for road in roads if not is_exact(road)]:
        parser.error(f"on this processor the numbers of {', '.join(inexact)} saturate; next step: record on an x86 with VNNI, or name other roads with --road")
    made_with = versions(LIBRARIES + ANDROID)
    before: dict[str, Any] = load_record() if given.road else {"versions": made_with, "networks": {}}
    if before["versions"] != made_with or (given.road and given.train):
        parser.error("some roads alone can be recorded only with the versions and weights of the others; next step: leave --road out")
    data, networks = digits(), before["networks"]
    outputs: dict[str, torch.Tensor] = {}
    for name in NETWORKS:
        if given.train:
            train(name)
        with torch.no_grad():
            outputs[name] = build(name)(torch.from_numpy(data.test)).contiguous()
        accuracy = float((outputs[name].argmax(1).numpy() == data.test_labels).mean())
        reference = outputs[name][:STORED].numpy()
        networks.setdefault(name, {})["torch"] = {"accuracy": round(accuracy, 6)}
        for road in roads:
            with tempfile.TemporaryDirectory() as work:
                found = measure(name, road, Path(work))
            signal = signal_db(reference, found.pop("outputs"))
            networks[name][road] = found | {"sqnr_db": round(signal, 2)}
            print(f"{name} by {road}: accuracy {found['accuracy']:.4f} (torch {accuracy:.4f}), {signal:.1f} dB")
    if not given.road:
        save_file({name: value[:STORED].clone() for name, value in outputs.items()}, HERE / "outputs.safetensors")
    RECORD.write_text(json.dumps({"versions": made_with, "networks": networks}, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
