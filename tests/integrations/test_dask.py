"""Calibration on workers: the same moments and the same plan, whoever dies."""

from __future__ import annotations

import concurrent.futures
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from build import as_array, build, traced

import lindep_onnx
from lindep_onnx.calibration.collect import collect_statistics
from lindep_onnx.calibration.shards import elsewhere
from lindep_onnx.data.inputs import InputSpec
from lindep_onnx.data.samples import open_samples
from lindep_onnx.errors import UsageError
from lindep_onnx.integrations.dask import connected
from lindep_onnx.log import Log
from lindep_onnx.model import weights as storage
from lindep_onnx.options import Config, DataOptions
from lindep_onnx.runtime.backend import Runtime

RUNTIME = Runtime(threads=1)
SPECS = [InputSpec("x", np.dtype(np.float32), ("N", 3, 16, 16))]


def net():
    w = as_array("w", (16, 3, 3, 3))
    w[5] = 2 * w[4]
    bias = np.r_[-60.0, -4.0, np.zeros(14)].astype(np.float32)
    body = "h = Conv<pads=[1,1,1,1]>(x, w, b)\nr = Relu(h)\ng = Conv(r, v)\ny = Relu(g)"
    return build(body, {"w": w, "b": bias, "v": (8, 16, 1, 1)}, x=("N", 3, 16, 16))


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 3, 16, 16)).astype(np.float32)


class Dying:
    """A client that kills one worker once all shards are on their way."""

    def __init__(self, client) -> None:
        self._client = client
        self._killed = False

    def __getattr__(self, name: str):
        return getattr(self._client, name)

    def submit(self, *arguments, **options):
        if not self._killed:
            self._killed = True
            victim = next(iter(self._client.run(os.getpid).values()))
            os.kill(victim, signal.SIGKILL)
        return self._client.submit(*arguments, **options)


class Here:
    """A client whose only worker is this process."""

    def scheduler_info(self):
        return {"workers": {"here": {"host": "here"}}}

    def scatter(self, job, **_):
        return job

    def submit(self, run, *arguments, pure):
        done = concurrent.futures.Future()
        done.set_result(run(*arguments))
        done.release = lambda: None
        return done

    def cancel(self, _):
        pass


def test_workers_make_of_images_what_one_process_makes(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (120, 16, 16, 3), np.uint8)):
        image.fromarray(pixels).save(tmp_path / f"{number:03}.png")
    options = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "max_samples": 100, "batch_size": 4}
    found = []
    for client in (None, Here()):
        with lindep_onnx.calibrate(lindep_onnx.trace(net()), str(tmp_path), client=client, **options) as seen:
            found.append([(consumer.mean, consumer.gram) for consumer in seen.statistics.consumers])
    for one, two in zip(*found, strict=True):
        for here, there in zip(one, two, strict=True):
            np.testing.assert_allclose(there, here, rtol=1e-12, atol=1e-12 * np.abs(here).max())


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [lambda client: client, Dying], ids=["calm", "one dies"])
def test_two_workers_give_the_moments_and_the_plan_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrap
) -> None:
    pytest.importorskip("distributed")
    model, path = net(), tmp_path / "calib.npz"
    np.savez(path, x=images(300))
    channels = traced(model)
    with (
        connected("2") as client,
        open_samples(str(path), SPECS, DataOptions(batch_size=8)) as samples,
    ):
        over = elsewhere(wrap(client), str(path), Config())
        (_, here, uncertain), (_, there, other) = (
            collect_statistics(channels, samples, RUNTIME, Log(), seed=0, over=over) for over in (None, over)
        )
        assert here.samples == there.samples and here.inactive.any()
        assert (uncertain == other).all()
        for one, two in zip(here.consumers, there.consumers, strict=True):
            assert (one.rows, one.effective_rows) == (two.rows, two.effective_rows)
            np.testing.assert_allclose(two.gram, one.gram, rtol=1e-12, atol=1e-12 * np.abs(one.gram).max())
            np.testing.assert_allclose(two.mean, one.mean, rtol=1e-12, atol=1e-12 * np.abs(one.mean).max())
            assert (one.active == two.active).all()
        alone = lindep_onnx.compress(model, str(path), batch_size=8)
        together = lindep_onnx.compress(model, str(path), batch_size=8, client=wrap(client))
        monkeypatch.setattr(storage, "IN_MEMORY", 0)
        monkeypatch.setattr(storage, "EXTERNAL_BYTES", 64)
        mapped = lindep_onnx.compress(model, str(path), batch_size=8, client=wrap(client))
    assert mapped.model.SerializeToString() == together.model.SerializeToString()
    groups = [[(group.name, group.channels_after) for group in result.report.groups] for result in (alone, together)]
    assert groups[0] == groups[1] and sum(group.removed for group in alone.report.groups) >= 1


def test_data_that_workers_cannot_read_is_refused() -> None:
    with pytest.raises(UsageError, match="not a generator"):
        elsewhere(object(), iter([{"x": images(3)}]), Config())
    elsewhere(object(), {"x": images(3)}, Config())


def test_an_address_that_nothing_answers_at_is_one_clear_error() -> None:
    pytest.importorskip("distributed")
    with pytest.raises(UsageError, match="--cluster takes the address"), connected("nonsense"):
        pass


@pytest.mark.parametrize("number", ["0", "257", "9" * 40])
def test_a_number_of_processes_that_no_machine_has_is_refused_at_once(number: str) -> None:
    with pytest.raises(UsageError, match="at most 256 processes"), connected(number):
        pass
