"""One model in a process of its own, run when it is told to: what `timing` starts, by the path of this file.

It imports nothing of this package, so that it is there in a fraction of a second. Lines of JSON come in on the standard
input: first what to open, then what to run; each is answered by one line, the seconds of every run that counts or an
error. Between lines nothing runs, and when the input ends, so does the process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    """Open a model, and run it as long as lines come in."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    opened = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            opened = opened or _opened(asked)
            answer: dict[str, Any] = {"seconds": _run(*opened, asked["discard"], asked["seconds"])}
        except Exception as error:  # of ONNX Runtime, which have no common base
            answer = {"error": str(error) or type(error).__name__}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _opened(asked: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The session and its feeds."""
    sys.path[:] = asked["path"]  # where the process that asks finds its packages, and not the folder of this file
    import numpy
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = asked["threads"]
    source = asked["model"]
    if asked["folder"] is not None:
        options.add_session_config_entry(asked["folder_option"], asked["folder"])
        with open(source, "rb") as file:  # noqa: PTH123 - pathlib takes long to import
            source = file.read()
    providers = [(name, settings) for name, settings in asked["providers"]]
    with numpy.load(asked["feeds"]) as archive:
        names = archive["names"].tolist()
        feeds = {name: archive[str(place)] for place, name in enumerate(names)}
    if any("CUDA" in name or "Tensorrt" in name for name, _ in providers) and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # which the process that asks may have done, or PyTorch in it
    session = onnxruntime.InferenceSession(source, options, providers=providers)
    left_out = [name for name, _ in providers if name not in session.get_providers()]
    if left_out:  # ONNX Runtime goes on with the others, and that would be another time
        raise RuntimeError(f"{left_out[0]} does not start in it")
    return session, feeds


def _run(session: Any, feeds: dict[str, Any], discard: float, seconds: float) -> list[float]:
    """Seconds of every run: all that begin in so many seconds, at least one, after those that are discarded."""
    now = time.perf_counter
    start = now()
    while now() < start + discard:
        session.run(None, feeds)
    taken: list[float] = []
    start = last = now()
    while not taken or last < start + seconds:
        session.run(None, feeds)
        taken.append(now() - last)
        last += taken[-1]
    return taken


if __name__ == "__main__":
    main()
