"""Compress, then quantise: the accuracy, size and latency of each step and of quantisation alone.

    python tools/quantise.py TASK MODEL.onnx DATA [--keep SHARE] [--samples N] [--out FOLDER]

TASK and DATA are those of tools/tasks.py. Quantisation is ONNX Runtime's static one (QDQ, int8, one scale a channel),
calibrated on the images that the compression saw. Accuracy is that on the test images; latency is the median of single
runs, all four models in turn.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from tasks import TASKS, open_task, outputs, score

import lindep_onnx
from lindep_onnx.model.cost import cost
from lindep_onnx.model.ir import load
from lindep_onnx.runtime.backend import measure_latency

QUANTISATION_SAMPLES = 256


class ConsumerNode(CalibrationDataReader):  # type: ignore[misc]
    """The images, in batches, as ONNX Runtime's calibration asks for them."""

    def __init__(self, name: str, images: NDArray[np.float32], batch: int) -> None:
        self._feeds: Iterator[Mapping[str, Any]] = iter(
            [{name: images[at : at + batch]} for at in range(0, len(images), batch)]
        )

    def get_next(self) -> Mapping[str, Any] | None:
        """The next batch; None at the end."""
        return next(self._feeds, None)


def quantise(source: Path, target: Path, name: str, images: NDArray[np.float32]) -> None:
    """Static int8 quantisation.

    Args:
        source: a floating-point model.
        target: where the quantised one goes.
        name: of the input.
        images: to calibrate with.
    """
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready.onnx"
        quant_pre_process(str(source), str(ready))
        fixed = onnx.load(source, load_external_data=False).graph.input[0].type.tensor_type.shape.dim[0].dim_value
        quantize_static(
            str(ready),
            str(target),
            ConsumerNode(name, images[:QUANTISATION_SAMPLES], fixed or 32),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--keep", type=float, default=0.65, help="share of the parameters, or of hidden neurons")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--recover", help="steps of training against the original before quantisation")
    parser.add_argument("--out", type=Path, default=Path())
    given = parser.parse_args()
    task = open_task(given.task, given.model, given.data, final=True, samples=given.samples)
    reference = outputs(given.model, task.input, task.judged)
    budget = {"params": given.keep}
    if task.of_neurons:
        channels, classes = cost(load(given.model), {}).channels, reference.shape[1]
        budget = {"channels": (given.keep * (channels - classes) + classes) / channels}
    small, int8, both = (given.out / f"{given.model.stem}_{end}.onnx" for end in ("small", "int8", "small_int8"))

    result = lindep_onnx.compress(given.model, {task.input: task.calib}, recover=given.recover, **budget)
    onnx.save(result.model, small)
    quantise(given.model, int8, task.input, task.calib)
    quantise(small, both, task.input, task.calib)

    models = {"original": given.model, "int8": int8, "compressed": small, "compressed, int8": both}
    sessions = [onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]) for path in models.values()]
    times = measure_latency(sessions, {task.input: task.calib[:1]}, seconds=8.0)
    print(f"{'model':<18}{task.metric:>10}{'kB':>10}{'ms':>8}")
    for (name, path), time in zip(models.items(), times, strict=True):
        reached = score(task, reference, outputs(path, task.input, task.judged))
        print(f"{name:<18}{reached:>10.2%}{path.stat().st_size / 1000:>10,.0f}{time:>8.2f}")


if __name__ == "__main__":
    main()
