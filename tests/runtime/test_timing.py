"""Models timed in processes of their own: what is known about them is found, and no process stays."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import scipy.stats
from build import build
from timings import timing

from lindep_onnx.errors import TimingError
from lindep_onnx.model import weights as storage
from lindep_onnx.model.ir import Model, load
from lindep_onnx.runtime import timing as module
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.runtime.timing import Ratio, Stopwatch, median_ratio

ONE = Runtime(threads=1)
WORK = {"w": (256, 256)}


def chain(steps: int) -> Model:
    """So many products in a row, of the same size each."""
    lines = [f"t{step} = MatMul({'x' if not step else f't{step - 1}'}, w)" for step in range(steps)]
    return load(build("\n".join([*lines, f"y = Relu(t{steps - 1})"]), WORK, x=("N", 256)))


def feeds(rows: int = 256) -> dict[str, np.ndarray]:
    return {"x": np.ones((rows, 256), np.float32)}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[str]]:
    found: list[subprocess.Popen[str]] = []

    class Told(subprocess.Popen):
        def __init__(self, *given: object, **named: object) -> None:
            super().__init__(*given, **named)
            found.append(self)

    monkeypatch.setattr(module.subprocess, "Popen", Told)
    return found


@pytest.mark.timed
def test_a_ratio_that_is_known_is_found_and_processes_end(started: list[subprocess.Popen[str]]) -> None:
    with Stopwatch(chain(16), feeds(), ONE, batch=256) as stopwatch:
        quarter, same = stopwatch.compare(chain(4)), stopwatch.compare(chain(16))
        assert [process.poll() is None for process in started] == [False, True, True, False]
    assert all(process.poll() is not None for process in started)
    # Others may use the same cores: then intervals are wide, but they lie where they should.
    assert quarter.low < 0.45 and quarter.high > 0.12 and quarter.low <= quarter.ratio <= quarter.high
    for found in (quarter.control, same.control, same):
        assert found.low < 1.25 and found.high > 0.8, found
    assert quarter.ratio < same.ratio
    assert (quarter.rounds, quarter.batch, quarter.threads) == (21, 256, 1)


@pytest.mark.timed
def test_a_model_that_cannot_be_run_is_one_clear_error(started: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    (tmp_path / "none.onnx").write_bytes(b"none")
    for found, wrong in ((tmp_path / "none.onnx", feeds()), (chain(1), {"x": np.ones((2, 3), np.float32)})):
        with (
            pytest.raises(TimingError, match="cannot be timed in a process"),
            Stopwatch(chain(1), wrong, ONE) as stopwatch,
        ):
            stopwatch.compare(found)
    elsewhere = Runtime.named(("CUDAExecutionProvider", "CPUExecutionProvider"))
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with (
            pytest.raises(TimingError, match="CUDAExecutionProvider does not start"),
            Stopwatch(chain(1), feeds(), elsewhere) as stopwatch,
        ):
            stopwatch.compare(chain(1))
    assert started and all(process.poll() is not None for process in started)


@pytest.mark.timed
def test_a_process_that_dies_hangs_or_is_interrupted_leaves_none_behind(
    started: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(module.threading.Timer):  # at once
        def __init__(self, seconds: float, what: object) -> None:
            super().__init__(0.0, what)

    with monkeypatch.context() as patched, Stopwatch(chain(1), feeds(1), ONE) as stopwatch:
        patched.setattr(module.threading, "Timer", Killed)
        with pytest.raises(TimingError, match="ended with code"):
            stopwatch.compare(chain(1))
    with pytest.raises(KeyboardInterrupt), Stopwatch(chain(1), feeds(1), ONE) as stopwatch:
        monkeypatch.setattr(module.np, "median", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        stopwatch.compare(chain(1))
    assert len(started) == 6 and all(process.poll() is not None for process in started)


@pytest.mark.timed
def test_weights_in_files_and_text_are_fed_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "IN_MEMORY", 0)
    large = chain(1)
    assert large.folder is not None and large.proto.graph.initializer[0].data_location == onnx.TensorProto.EXTERNAL
    with Stopwatch(large, feeds(1), ONE, seconds=0.01) as stopwatch:
        assert stopwatch.compare(large).after > 0
    text = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (string[N] s) => (string[N] y) { y = Identity(s) }'
    )
    onnx.save(text, tmp_path / "text.onnx")
    with Stopwatch(tmp_path / "text.onnx", {"s": np.array(["a", "bc"], object)}, ONE, seconds=0.01) as stopwatch:
        assert stopwatch.compare(tmp_path / "text.onnx").rounds >= 6


def test_a_difference_has_to_leave_the_interval_and_the_control() -> None:
    assert timing(0.5).faster and not timing(0.5).slower and timing(1.5).slower and timing(1.5).differs
    assert not timing(1.0).differs and not timing(1.0).faster
    assert timing(1.025).differs and not timing(1.025).slower  # the interval begins below 1.02
    noisy = dataclasses.replace(timing(0.9), control=Ratio(1.0, 0.8, 1.3))
    assert not noisy.differs and not noisy.faster


@pytest.mark.parametrize("count", [6, 7, 10, 11, 30])
def test_the_interval_is_that_of_order_statistics(count: int) -> None:
    shares = np.random.default_rng(count).lognormal(size=count)
    found, wanted = median_ratio(shares), scipy.stats.quantile_test(shares, q=1.0, p=0.5).confidence_interval(0.95)
    assert (found.low, found.high) == (wanted.low, wanted.high) and found.ratio == np.median(shares)


class Pretended:
    """A process whose runs take what its model is said to take."""

    def __init__(self, told: list[tuple[float, float]], seconds: dict[str, float]) -> None:
        self._told, self._seconds = told, seconds

    def __call__(self, asked: object, what: str, log: object) -> Pretended:
        made = Pretended(self._told, self._seconds)
        made._taken = self._seconds[what]
        return made

    def __enter__(self) -> Pretended:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, seconds: float, discard: float) -> list[float]:
        self._told.append((seconds, discard))
        return [self._taken]


@pytest.mark.timed
@pytest.mark.parametrize(
    ("taken", "seconds", "rounds", "block", "discard"),
    [
        (0.001, None, 21, 0.03, 0.01),
        (0.001, 6.3, 21, 0.1, 0.01),
        (0.45, None, 6, 0.675, 0.01),
        (2.0, 36.0, 6, 3.0, 0.0),
    ],
)
def test_long_runs_are_made_less_often(
    taken: float, seconds: float | None, rounds: int, block: float, discard: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[float, float]] = []
    monkeypatch.setattr(module, "_Process", Pretended(told, {"original": taken, "result": taken / 2}))
    with Stopwatch(chain(1), feeds(1), ONE, seconds=seconds) as stopwatch:
        found = stopwatch.compare(chain(1))
    assert (found.before, found.ratio, found.low, found.high) == (1000 * taken, 0.5, 0.5, 0.5)
    assert found.faster and found.control == Ratio(1.0, 1.0, 1.0) and found.rounds == rounds
    assert told[:3] == [(0.0, 0.0)] * 3 and len(told) == 3 + 3 * rounds
    assert all(asked == pytest.approx((block, discard)) for asked in told[3:])


@pytest.mark.timed
def test_a_glance_needs_no_copy_and_finds_the_ratio_too(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[float, float]] = []
    monkeypatch.setattr(module, "_Process", Pretended(told, {"original": 0.002, "result": 0.0005}))
    with Stopwatch(chain(1), feeds(1), ONE, seconds=100.0) as stopwatch:
        assert stopwatch.glance(chain(1)) == 0.25
    assert len(told) == 2 + 2 * module.LOOKS and told[-1] == (module.BLOCK, module.DISCARDED)
