"""Write the JSON schema of reports: python tools/schema.py docs/report.schema.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lindep_onnx.report.schema import report_schema

if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(report_schema(), indent=2) + "\n", encoding="utf-8")
