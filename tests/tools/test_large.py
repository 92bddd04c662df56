"""A model with external data inside the memory that `bench_memory.py` states."""

from __future__ import annotations

from pathlib import Path

import bench_memory as large
import pytest

from lindep_onnx.model import weights as storage


@pytest.mark.slow
def test_a_model_of_many_wide_layers_stays_inside_the_stated_memory(tmp_path: Path) -> None:
    model = large.build(tmp_path, 0.4, 512)
    assert large.file_size(model) > storage.IN_MEMORY / 1e6  # else its weights are in memory
    limit = large.allowed(model)
    ran = large.compress_it(model, tmp_path / "small.onnx", limit)
    assert ran.code == 0 and 0 < ran.peak < limit, ran
    before, after = large.widths_of(model), large.widths_of(tmp_path / "small.onnx")
    assert sum(before) - sum(after) == before.count(512) * large.copies_of(512)
    assert set(after) == {512 - large.copies_of(512), 16}
    refused = large.compress_it(model, tmp_path / "none.onnx", limit / 4)
    assert refused.code != 0 and not (tmp_path / "none.onnx").exists()
