"""What saved moments save: python tools/sweep.py MODEL.onnx DATA [SHARE ...] [--refit fold].

Compresses to each share of the parameters from the start and with the moments of the first run, side by side, and says
whether both give the same bytes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import lindep_onnx


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("shares", nargs="*", type=float, default=[0.8, 0.65, 0.5])
    parser.add_argument("--refit", default="auto")
    parser.add_argument("--max-samples", type=int)
    given = parser.parse_args()
    totals = [0.0, 0.0]
    with tempfile.TemporaryDirectory() as folder:
        moments = Path(folder) / "moments.npz"
        for share in given.shares:
            options: dict[str, Any] = {"params": share, "refit": given.refit, "max_samples": given.max_samples}
            first, fresh = timed(given, options, save_moments=moments)
            again, loaded = timed(given, options, load_moments=moments)
            totals = [totals[0] + fresh, totals[1] + loaded]
            same = first.model.SerializeToString() == again.model.SerializeToString()
            print(
                f"{share:.2f}: {fresh:6.1f} s from the start, {loaded:6.1f} s with moments, same bytes: {same}",
                flush=True,
            )
        print(f"all:  {totals[0]:6.1f} s and {totals[1]:6.1f} s; file of {moments.stat().st_size:,} bytes")


def timed(given: argparse.Namespace, options: dict[str, Any], **files: Path) -> tuple[lindep_onnx.Result, float]:
    start = time.perf_counter()
    result = lindep_onnx.compress(given.model, given.data, **options, **files)
    return result, time.perf_counter() - start


if __name__ == "__main__":
    main()
