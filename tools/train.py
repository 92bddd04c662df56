"""Train the demonstration model, or an over-wide VGG-style net, on Fashion-MNIST.

`demo` is small and mixed on purpose: padded 3x3 convolutions with separate BatchNormalization, a residual Add, a
depthwise convolution with ReLU6, MaxPool, AveragePool, and a Flatten over 3x3 positions into two Gemm. It is wider
than the task needs, and is trained to show that: each step of SGD is followed by the proximal step of an L1 penalty
on the BatchNormalization scales (network slimming, Liu et al., arXiv 1708.06519) and of a group lasso on the hidden
neurons (Yuan and Lin, 2006). Both shrink by soft thresholding, which reaches exact zeros, so that a share of the
channels ends constant. Nothing is edited after training. It is written with the data that the README uses.

`vgg` has five padded 3x3 convolutions, each with its BatchNormalization, and three Gemm: 5.6 M parameters, far more
than the task needs, trained without any penalty on width. So it holds approximate redundancy, and next to none that is
exact. The last 5,000 training images stay unseen, for choices that accuracy decides.

Needs PyTorch, which the package itself never imports. DATA holds the four idx `.gz` files of Fashion-MNIST.

Usage: python tools/train.py demo DATA OUT_DIR --epochs 8
       python tools/train.py vgg DATA OUT_DIR --epochs 3
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from tasks import Places, fashion, normalised, outputs

OPSET = 17
CALIBRATION_SAMPLES, TEST_SAMPLES = 1000, 500
#: Strength of the L1 penalty on each BatchNormalization scale, and of the group lasso on each hidden neuron.
SCALE_PENALTY, NEURON_PENALTY = 2.5e-2, 8e-3
#: The over-wide net is trained on the images before this one.
TRAINED_ON = 55_000


class DemoNet(nn.Module):
    """A convolutional classifier of [N, 1, 28, 28] images into 10 classes, 0.15 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv(1, 32), nn.ReLU(), nn.MaxPool2d(2))  # 14 x 14
        self.branch = nn.Sequential(*_conv(32, 64), nn.ReLU(), *_conv(64, 32))
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


def vgg() -> nn.Sequential:
    """The untrained net, images [N, 1, 28, 28] to scores [N, 10]."""
    layers: list[nn.Module] = []
    inputs = 1
    for widths in ((32,), (64, 64), (128, 128)):  # at 28 x 28, 14 x 14 and 7 x 7 positions
        for width in widths:
            layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(128 * 3 * 3, 1792), nn.ReLU(), nn.Linear(1792, 1792), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(1792, 10))


@torch.no_grad()
def _shrink(net: nn.Module, rate: float) -> None:
    """The proximal step of both penalties: soft thresholding by rate times strength."""
    assert isinstance(net, DemoNet)
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.weight.copy_(norm.weight.sign() * (norm.weight.abs() - rate * SCALE_PENALTY).clamp(min=0))
    weight, bias = net.hidden.weight, net.hidden.bias
    size = (weight.square().sum(dim=1) + bias.square()).sqrt()  # of each neuron, [128]
    kept = (1 - rate * NEURON_PENALTY / size.clamp(min=1e-12)).clamp(min=0)
    weight.mul_(kept[:, None])
    bias.mul_(kept)


#: The untrained net, its peak rate, and what follows each step.
NETS: dict[str, tuple[Callable[[], nn.Module], float, Callable[[nn.Module, float], None]]] = {
    "demo": (DemoNet, 0.1, _shrink),
    "vgg": (vgg, 0.05, lambda *_: None),
}


def train(name: str, images: Tensor, labels: Tensor, *, epochs: int, seed: int) -> nn.Module:
    """Minimise cross-entropy by SGD.

    Args:
        name: of the net.
        images: float32 [count, 1, 28, 28], normalised.
        labels: int64 [count].
        epochs: passes over the images.
        seed: of the initial weights and of the order of the images.

    Returns:
        The trained net, in evaluation mode.
    """
    make, peak, after_step = NETS[name]
    torch.manual_seed(seed)
    net = make()
    optimizer = torch.optim.SGD(net.parameters(), peak, 0.9, nesterov=True, weight_decay=5e-4)
    batches = len(images) // 128
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, epochs=epochs, steps_per_epoch=batches)
    for epoch in range(epochs):
        losses = []
        for batch in torch.randperm(len(images))[: batches * 128].reshape(batches, 128):
            loss = nn.functional.cross_entropy(net(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            after_step(net, optimizer.param_groups[0]["lr"])
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}/{epochs}: loss {np.mean(losses):.4f}", flush=True)
    return net.eval()


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
    parser.add_argument("net", choices=NETS)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)

    places = Places(fashion=args.data)
    (images, labels), (test, truth) = fashion(places, False), fashion(places, True)
    used = TRAINED_ON if args.net == "vgg" else len(images)
    inputs = normalised(images[:used])
    targets = torch.from_numpy(labels[:used].astype(np.int64))
    net = train(args.net, torch.from_numpy(inputs), targets, epochs=args.epochs, seed=args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    model = args.out / ("overwide.onnx" if args.net == "vgg" else "demo.onnx")
    export(net, model)
    right = outputs(model, normalised(test)).argmax(axis=1) == truth
    parameters = sum(parameter.numel() for parameter in net.parameters())
    print(f"{model}: {parameters} parameters, top-1 {right.mean():.2%} of {len(right)} test images")
    if args.net == "demo":
        _samples(args.out, args.seed, inputs, test, truth)


def _samples(
    folder: Path, seed: int, inputs: NDArray[np.float32], test: NDArray[np.uint8], truth: NDArray[np.uint8]
) -> None:
    """Write calibration and test samples beside the demonstration model, and say what belongs into its README."""
    model, calib, sample = (folder / name for name in ("demo.onnx", "calib.npz", "test_sample.npz"))
    rng = np.random.default_rng(seed)
    calibration = inputs[np.sort(rng.choice(len(inputs), CALIBRATION_SAMPLES, replace=False))]
    np.savez_compressed(calib, image=calibration)
    chosen = np.sort(rng.choice(len(test), TEST_SAMPLES, replace=False))
    np.savez_compressed(sample, images=test[chosen], labels=truth[chosen])
    counts = list(constant_channels(model, calibration))
    for name, constant, channels in counts:
        print(f"{name}: {constant} of {channels} channels are constant over the calibration samples")
    constant, channels = sum(row[1] for row in counts), sum(row[2] for row in counts)
    print(f"all activations: {constant} of {channels} ({constant / channels:.0%})")
    for path in (model, calib, sample):
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}  {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
