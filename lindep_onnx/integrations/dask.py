"""Workers of Dask (`distributed`, an optional extra) for calibration; see `lindep_onnx.calibration.shards`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lindep_onnx.calibration.shards import PATIENCE
from lindep_onnx.errors import UsageError

#: More processes than this are a slip of the finger.
MAX_PROCESSES = 256


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """A client of a scheduler, or of so many new processes on this machine if `address` is a number.

    Raises:
        UsageError: Dask is not installed, nothing answers, or that is no number of processes for one machine.
    """
    if address.isdecimal() and not 0 < int(address) <= MAX_PROCESSES:
        raise UsageError(f"--cluster takes at most {MAX_PROCESSES} processes, and at least one, not {address}.")
    try:
        import distributed
    except ImportError as error:
        raise UsageError('--cluster needs Dask: pip install "lindep-onnx[cluster]".') from error
    import dask

    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1TB"}):
        if address.isdecimal():
            with (
                distributed.LocalCluster(
                    n_workers=int(address), threads_per_worker=1, processes=True, dashboard_address=None, memory_limit=0
                ) as cluster,
                distributed.Client(cluster) as client,
            ):
                yield client
            return
        try:
            client = distributed.Client(address, timeout=PATIENCE)
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(
                f"--cluster takes the address of a Dask scheduler, such as tcp://host:8786, or a number of processes; "
                f"nothing answers at {address!r}."
            ) from error
        with client:
            yield client
