"""`python -m lindep_onnx`."""

from __future__ import annotations

import sys

from lindep_onnx.cli import main

if __name__ == "__main__":
    sys.exit(main())
