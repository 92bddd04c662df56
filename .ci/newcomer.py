"""Time a newcomer's path: the three commands at the top of docs/index.md, in a fresh folder and a fresh environment.

    python .ci/newcomer.py [--browser COMMAND]

Packages are downloaded first and timed apart. The browser (chromium without a window by default) opens the report; its
exit code says whether it could.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
BROWSER = "chromium --headless --no-sandbox --disable-gpu --screenshot=opened.png"


def commands() -> list[str]:
    """The first block of commands of the quick start."""
    block = re.search(r"```sh\n(.*?)```", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert block is not None
    return block[1].strip().splitlines()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--browser", default=BROWSER, help="what opens a page")
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        checkout, wheels = Path(folder) / "lindep_onnx", Path(folder) / "wheels"
        ignored = shutil.ignore_patterns(".git", "*.egg-info", "build", "__pycache__")
        shutil.copytree(ROOT, checkout, ignore=ignored)
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        start = time.perf_counter()
        for wanted in (str(checkout), "setuptools>=77"):
            download = [sys.executable, "-m", "pip", "download", "-q", "--dest", str(wheels), wanted]
            subprocess.run(download, check=True, env=own, capture_output=True)
        print(f"{time.perf_counter() - start:6.1f} s  downloads")
        # Programs are asked for by name, so that a browser finds the page where the shell is.
        own.update(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels), BROWSER=f"{given.browser} %s")
        said = (Path(folder) / "said").open("w+")
        shell = subprocess.Popen(
            ["bash", "-e"], stdin=subprocess.PIPE, stdout=said, stderr=said, cwd=checkout, env=own, text=True
        )
        assert shell.stdin is not None
        for number, command in enumerate(commands()):
            done = Path(folder) / f"done{number}"
            start = time.perf_counter()
            shell.stdin.write(f"{command}\ntouch {done}\n")
            shell.stdin.flush()
            while not done.exists():
                if shell.poll() is not None:
                    said.seek(0)
                    print(f"failed: {command}", said.read(), sep="\n")
                    return 1
                time.sleep(0.05)
            print(f"{time.perf_counter() - start:6.1f} s  {command}", flush=True)
        shell.stdin.close()
        shell.wait()
        said.close()
        opened = checkout / "opened.png"
        print(f"the browser {'opened the report' if opened.exists() else 'wrote no opened.png'}")
        return 0 if opened.exists() or given.browser != BROWSER else 1


if __name__ == "__main__":
    sys.exit(main())
