"""Train the demonstration model on Fashion-MNIST, and write it with the data that the README uses.

The net is small and mixed on purpose: padded 3x3 convolutions with separate BatchNormalization, a residual Add, a
depthwise convolution with ReLU6, MaxPool, AveragePool, and a Flatten over 3x3 positions into two Gemm. It is wider
than the task needs, and is trained to show that: each step of SGD is followed by the proximal step of an L1 penalty
on the BatchNormalization scales (network slimming, Liu et al., arXiv 1708.06519) and of a group lasso on the hidden
neurons (Yuan and Lin, 2006). Both shrink by soft thresholding, which reaches exact zeros, so that a share of the
channels ends constant. Nothing is edited after training.

Needs PyTorch, which the package itself never imports. DATA_DIR holds the four idx `.gz` files of Fashion-MNIST.

Usage: python tools/train_demo.py DATA_DIR OUT_DIR --epochs 8 --seed 0
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from accuracy import normalised, predictions
from fashion_mnist import read_idx
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["DemoNet", "constant_channels", "export", "main", "train"]

OPSET = 17
CALIBRATION_SAMPLES, TEST_SAMPLES = 1000, 500
PEAK_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4
#: Strength of the L1 penalty on each BatchNormalization scale, and of the group lasso on each hidden neuron.
SCALE_PENALTY, NEURON_PENALTY = 1.5e-2, 8e-3


class DemoNet(nn.Module):
    """A convolutional classifier of [N, 1, 28, 28] images into 10 classes, 0.13 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv(1, 32), nn.ReLU(), nn.MaxPool2d(2))  # 14 x 14
        self.branch = nn.Sequential(*_conv(32, 32), nn.ReLU(), *_conv(32, 32))
        self.separable = nn.Sequential(*_conv(32, 32, groups=32), nn.ReLU6(), *_conv(32, 64, kernel=1), nn.ReLU())
        self.last = nn.Sequential(nn.AvgPool2d(2), *_conv(64, 64), nn.ReLU(), nn.MaxPool2d(2))  # 3 x 3
        self.hidden = nn.Linear(64 * 3 * 3, 128)
        self.classes = nn.Linear(128, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Scores [N, 10] of images [N, 1, 28, 28]."""
        x = self.stem(image)
        x = torch.relu(x + self.branch(x))
        x = self.last(self.separable(x))
        scores: Tensor = self.classes(torch.relu(self.hidden(torch.flatten(x, 1))))
        return scores


def _conv(inputs: int, outputs: int, *, kernel: int = 3, groups: int = 1) -> tuple[nn.Module, nn.Module]:
    """A convolution that keeps the image size, and its BatchNormalization."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    norm = nn.BatchNorm2d(outputs)
    nn.init.constant_(norm.weight, 0.5)  # nearer to zero than the usual 1, for so short a training
    return conv, norm


def train(images: Tensor, labels: Tensor, *, epochs: int, seed: int) -> DemoNet:
    """Minimise cross-entropy plus the two penalties by proximal SGD.

    Args:
        images: float32 [count, 1, 28, 28], normalised.
        labels: int64 [count].
        epochs: passes over the images.
        seed: of the initial weights and of the order of the images.

    Returns:
        The trained net, in evaluation mode.
    """
    torch.manual_seed(seed)
    net = DemoNet()
    optimizer = torch.optim.SGD(net.parameters(), PEAK_RATE, MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY)
    batches = len(images) // 128
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, epochs=epochs, steps_per_epoch=batches)
    for epoch in range(epochs):
        losses = []
        for batch in torch.randperm(len(images))[: batches * 128].reshape(batches, 128):
            loss = nn.functional.cross_entropy(net(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            _shrink(net, rate=optimizer.param_groups[0]["lr"])
            schedule.step()
            losses.append(loss.item())
        zero = sum(int((norm.weight == 0).sum()) for norm in _norms(net))
        print(f"epoch {epoch + 1}/{epochs}: loss {np.mean(losses):.4f}, {zero} scales are zero", flush=True)
    return net.eval()


def _norms(net: nn.Module) -> Iterator[nn.BatchNorm2d]:
    return (module for module in net.modules() if isinstance(module, nn.BatchNorm2d))


@torch.no_grad()
def _shrink(net: DemoNet, *, rate: float) -> None:
    """The proximal step of both penalties: soft thresholding by rate times strength."""
    for norm in _norms(net):
        norm.weight.copy_(norm.weight.sign() * (norm.weight.abs() - rate * SCALE_PENALTY).clamp(min=0))
    weight, bias = net.hidden.weight, net.hidden.bias
    size = (weight.square().sum(dim=1) + bias.square()).sqrt()  # of each neuron, [128]
    kept = (1 - rate * NEURON_PENALTY / size.clamp(min=1e-12)).clamp(min=0)
    weight.mul_(kept[:, None])
    bias.mul_(kept)


def export(net: nn.Module, path: Path) -> None:
    """Write a classifier of [N, 1, 28, 28] images as ONNX: separate BatchNormalization nodes, a free batch axis `N`."""
    torch.onnx.export(
        net,
        (torch.zeros(1, 1, 28, 28),),
        path,
        dynamo=False,
        opset_version=OPSET,
        do_constant_folding=False,
        training=torch.onnx.TrainingMode.PRESERVE,  # EVAL would fuse the normalization into the convolution
        input_names=["image"],
        output_names=["scores"],
        dynamic_axes={"image": {0: "N"}, "scores": {0: "N"}},
    )


def constant_channels(path: Path, inputs: NDArray[np.float32]) -> Iterator[tuple[str, int, int]]:
    """Of each activation: its output's name, how many of its channels never change over the inputs, and of how many.

    Args:
        path: a model with one input, whose activations are Relu and Clip nodes.
        inputs: [count, ...], all samples of the input.
    """
    model = onnx.load(path)
    names = [node.output[0] for node in model.graph.node if node.op_type in ("Relu", "Clip")]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for name, values in zip(names, session.run(names, {model.graph.input[0].name: inputs}), strict=True):
        spread = np.ptp(np.moveaxis(values, 1, 0).reshape(values.shape[1], -1), axis=1)
        yield name, int((spread == 0).sum()), len(spread)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_dir", type=Path, metavar="DATA_DIR")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)

    files = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    if missing := [name for name in files if not (args.data_dir / name).is_file()]:
        sys.exit(f"{args.data_dir}: expected the files of Fashion-MNIST, but {', '.join(missing)} is missing.")
    train_images, train_labels, test_images, test_labels = (read_idx(args.data_dir / name) for name in files)

    inputs = normalised(train_images)
    net = train(
        torch.from_numpy(inputs), torch.from_numpy(train_labels.astype(np.int64)), epochs=args.epochs, seed=args.seed
    )

    args.out_dir.mkdir(parents=True, exist_ok=True)
    model, calib, sample = (args.out_dir / name for name in ("demo.onnx", "calib.npz", "test_sample.npz"))
    export(net, model)
    rng = np.random.default_rng(args.seed)
    calibration = inputs[np.sort(rng.choice(len(inputs), CALIBRATION_SAMPLES, replace=False))]
    np.savez_compressed(calib, image=calibration)
    chosen = np.sort(rng.choice(len(test_images), TEST_SAMPLES, replace=False))
    np.savez_compressed(sample, images=test_images[chosen], labels=test_labels[chosen])

    right = predictions(model, test_images) == test_labels
    print(f"top-1 {right.mean():.2%} of {len(right)} test images, {right[chosen].mean():.2%} of the {len(chosen)} kept")
    counts = list(constant_channels(model, calibration))
    for name, constant, channels in counts:
        print(f"{name}: {constant} of {channels} channels are constant over the calibration samples")
    constant, channels = sum(row[1] for row in counts), sum(row[2] for row in counts)
    print(f"all activations: {constant} of {channels} ({constant / channels:.0%})")
    for path in (model, calib, sample):
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}  {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
