"""A model with external data inside the memory that `tools/large.py` states."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import large


@pytest.mark.slow
def test_a_model_of_many_wide_layers_stays_inside_the_stated_memory(tmp_path: Path) -> None:
    model = large.build(tmp_path, 0.1, 512)
    ran = large.compress_it(model, tmp_path / "small.onnx")
    assert ran.within, ran
    before, after = large.widths_of(model), large.widths_of(tmp_path / "small.onnx")
    assert before.count(512) == 4 and sum(before) - sum(after) == 4 * large.copies_of(512)
    assert set(after) == {512 - large.copies_of(512), 16}
