"""The calibration of one model on local workers of Dask or of Ray, one thread each: start, run, processes.

Ray is not a dependency; install it beside to try it.

Usage: python tools/engines.py dask|ray MODEL.onnx calib.npz [--samples 80] [--workers 2 1]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from lindep_onnx.calibration.shards import Job, run_shard, shards_of
from lindep_onnx.data.samples import open_samples
from lindep_onnx.integrations.dask import connected
from lindep_onnx.options import Config, DataOptions
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.structure import traced as understanding

__all__ = ["main"]

SHARDS = 6


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=("dask", "ray"))
    parser.add_argument("model")
    parser.add_argument("calib")
    parser.add_argument("--samples", type=int, default=80)
    parser.add_argument("--workers", type=int, nargs="+", default=[2], metavar="N")
    given = parser.parse_args(arguments)
    for workers in given.workers:
        print(_row(given, workers), flush=True)


def _row(given: argparse.Namespace, workers: int) -> str:
    understood = understanding.load_and_trace(given.model, Config())
    specs = tuple(understanding.inputs_of(understood))
    with open_samples(given.calib, specs, DataOptions(max_samples=given.samples, batch_size=1)) as samples:
        shards = shards_of(samples, SHARDS)
    model = understood.channels.model.proto.SerializeToString()
    runtime = Runtime.named(("CPUExecutionProvider",), 1)
    job = Job(model, None, ((), (), 1), given.calib, specs, 1, (), given.samples, 0, runtime, workers)
    start = time.perf_counter()
    if given.engine == "dask":
        with connected(str(workers)) as client:
            up = time.perf_counter()
            everywhere = client.scatter(job, broadcast=True, hash=False)
            found = client.gather([client.submit(run_shard, everywhere, one, pure=False) for one in shards])
            done = time.perf_counter()
    else:
        import ray

        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
        up = time.perf_counter()
        everywhere, run = ray.put(job), ray.remote(max_retries=3)(run_shard)
        found = ray.get([run.remote(everywhere, one) for one in shards])
        done = time.perf_counter()
    fitted = sum(seen.samples[0] for seen, _ in found)
    return f"{given.engine}, {workers} workers: up in {up - start:.1f} s, {fitted} samples fitted in {done - up:.1f} s"


if __name__ == "__main__":
    main()
