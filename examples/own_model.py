"""A student at a quarter of its teacher's latency: put your own network and data in place of the five functions below.

python own_model.py
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import nn

import edgekd
from edgekd.options import Options, QuantizeOptions, SearchOptions, TrainOptions


def make_net(width: int = 48, depth: int = 4) -> nn.Module:
    """The family: edgekd calls this with every combination of the choices below. The teacher here is its largest member."""
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AvgPool2d(6), nn.Flatten(), nn.Linear(4 * width, 4))


def items(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images `(count, 1, 12, 12)` float32 with one bright quarter, and which quarter it is, 0 to 3."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 4, count)
    images = generator.standard_normal((count, 1, 12, 12)).astype(np.float32)
    for image, label in zip(images, labels, strict=True):
        image[0, label // 2 * 6 :, label % 2 * 6 :][:6, :6] += 1.0
    return images, labels


def train() -> tuple[np.ndarray, np.ndarray]:
    """What the student is trained on. A DataLoader or a data set does as well."""
    return items(300, seed=1)


def validation() -> tuple[np.ndarray, np.ndarray]:
    """What choices are made on."""
    return items(200, seed=2)


def test() -> tuple[np.ndarray, np.ndarray]:
    """What the verdict is about. Few items cannot prove a small drop: that ends in a refuse."""
    return items(800, seed=3)


def teacher() -> nn.Module:
    """The trained teacher. Yours: build the network, load its weights, return it."""
    torch.manual_seed(0)
    net = make_net()
    images, labels = (torch.from_numpy(part) for part in train())
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(3):
        for picks in torch.randperm(len(images)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[picks]), labels[picks]).backward()
            optimizer.step()
    return net.eval()


def main() -> int:
    """Compress, say what came out, and leave with the verdict's exit code: 0 pass, 1 fail, 2 refuse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="local", help="a profile: `edgekd targets` lists them")
    parser.add_argument("--run-dir", default="runs/own", help="a killed run continues here")
    parser.add_argument("--accept-simulated", action="store_true", help="let the null target pass, to try the script")
    given = parser.parse_args()
    from own_model import make_net as factory  # by a name that can be imported again, to rebuild the student with

    options = Options(
        train=TrainOptions(epochs=6, batch_size=32),
        search=SearchOptions(measurements=4, finalists=2, rung_epochs=2),
        quantize=QuantizeOptions(calibration_size=128),
        accept_simulated=given.accept_simulated,
    )
    with edgekd.connect(given.target) as target:
        result = edgekd.compress(
            teacher(),
            task="classification",
            train=train(),
            validation=validation(),
            test=test(),
            target=target,
            budget=edgekd.Budget(latency_share=0.25, percentile=50, max_drop=0.03),
            student=edgekd.Family(factory, width=[16, 48], depth=[1, 2]),
            run_dir=given.run_dir,
            seed=0,
            options=options,
        )
    print(result.verdict.outcome.value, result.verdict.reason, sep=": ")
    print("bundle:", result.bundle)
    print("report:", result.report)
    return result.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
