"""A report as a file, JSON or HTML by its suffix."""

from __future__ import annotations

from pathlib import Path

from lindep_onnx.errors import OutputError, UsageError
from lindep_onnx.files import check_folder, check_writable, replacing
from lindep_onnx.report.html import page
from lindep_onnx.report.values import Report


def check_path(path: Path) -> None:
    """Find out before the work whether a report can be written.

    Raises:
        UsageError: the suffix is neither .json nor .html.
        OutputError: there is no writing to it.
    """
    _check_suffix(path)
    check_writable(path)


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in (".json", ".html"):
        raise UsageError(f"{path}: a report is written as .json or .html, not {path.suffix or 'without a suffix'}.")


def write_report(report: Report, path: str | Path) -> None:
    """Write a report as .json or .html so that `path` holds either its old content or the complete new one.

    Raises:
        UsageError: another suffix.
        OutputError: the file cannot be written.
    """
    path = Path(path)
    _check_suffix(path)
    check_folder(path)
    text = report.to_json() if path.suffix.lower() == ".json" else page(report)
    try:
        with replacing(path) as staged:
            staged.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}).") from error
