"""Train an over-wide VGG-style net on Fashion-MNIST and write it as ONNX: a large model for benchmarks.

Five padded 3x3 convolutions, each with its BatchNormalization, and three Gemm: 5.6 M parameters, far more than the
task needs, trained without any penalty on width. So it holds approximate redundancy, and next to none that is exact.
The last 5,000 training images stay unseen, for choices that accuracy decides.

Needs PyTorch, which the package itself never imports. DATA_DIR holds the four idx `.gz` files of Fashion-MNIST.

Usage: python tools/train_vgg.py DATA_DIR OUT.onnx --epochs 3 --seed 0
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accuracy import normalised, predictions
from fashion_mnist import read_idx
from torch import Tensor, nn
from train_demo import export

__all__ = ["TRAINED_ON", "main", "train", "vgg"]

#: The training images before this one are trained on.
TRAINED_ON = 55_000


def vgg() -> nn.Sequential:
    """The untrained net, images [N, 1, 28, 28] to scores [N, 10]."""
    layers: list[nn.Module] = []
    inputs = 1
    for widths in ((32,), (64, 64), (128, 128)):  # at 28 x 28, 14 x 14 and 7 x 7 positions
        for outputs in widths:
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(128 * 3 * 3, 1792), nn.ReLU(), nn.Linear(1792, 1792), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(1792, 10))


def train(images: Tensor, labels: Tensor, *, epochs: int, seed: int) -> nn.Sequential:
    """Minimise cross-entropy by SGD.

    Args:
        images: float32 [count, 1, 28, 28], normalised.
        labels: int64 [count].
        epochs: passes over the images.
        seed: of the initial weights and of the order of the images.

    Returns:
        The trained net, in evaluation mode.
    """
    torch.manual_seed(seed)
    net = vgg()
    optimizer = torch.optim.SGD(net.parameters(), 0.05, 0.9, nesterov=True, weight_decay=5e-4)
    batches = len(images) // 128
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, epochs=epochs, steps_per_epoch=batches)
    for epoch in range(epochs):
        losses = []
        for batch in torch.randperm(len(images))[: batches * 128].reshape(batches, 128):
            loss = nn.functional.cross_entropy(net(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}/{epochs}: loss {np.mean(losses):.4f}", flush=True)
    return net.eval()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_dir", type=Path, metavar="DATA_DIR")
    parser.add_argument("out", type=Path, metavar="OUT.onnx")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)

    images = torch.from_numpy(normalised(read_idx(args.data_dir / "train-images-idx3-ubyte.gz")[:TRAINED_ON]))
    labels = torch.from_numpy(read_idx(args.data_dir / "train-labels-idx1-ubyte.gz")[:TRAINED_ON].astype(np.int64))
    net = train(images, labels, epochs=args.epochs, seed=args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    export(net, args.out)

    right = predictions(args.out, read_idx(args.data_dir / "t10k-images-idx3-ubyte.gz")) == read_idx(
        args.data_dir / "t10k-labels-idx1-ubyte.gz"
    )
    parameters = sum(parameter.numel() for parameter in net.parameters())
    print(f"{args.out}: {parameters} parameters, top-1 {right.mean():.2%} of {len(right)} test images")


if __name__ == "__main__":
    main()
