"""The bench that times widths: what it builds, and that it sees a difference."""

from __future__ import annotations

import bench_widths
import numpy as np
import pytest
from build import run


@pytest.mark.parametrize("name", bench_widths.CHAINS)
def test_chains_run_at_every_width_that_is_timed(name: str) -> None:
    chain = bench_widths.CHAINS[name]
    feeds = {"x": np.ones(chain.shape, np.float32)}
    widths = bench_widths.widths_of(chain)
    assert widths["full"] == chain.full > min(widths.values()) > 0
    assert all(width % chain.parts == 0 for width in widths.values())
    (full,), (narrow,) = (run(bench_widths.build(chain, widths[column]), feeds) for column in ("full", "1/4 -1"))
    assert full.shape == narrow.shape and not np.allclose(full, narrow)


def test_the_quantised_chain_computes_in_8_bits() -> None:
    chain = bench_widths.CHAINS["Gemm, Gemm: 512-w-512, 1 row"]
    feeds = {"x": np.ones(chain.shape, np.float32)}
    proto = bench_widths.quantised(bench_widths.build(chain, 64), feeds)
    assert {node.op_type for node in proto.graph.node} >= {"QuantizeLinear", "DequantizeLinear"}


def test_a_quarter_of_the_width_takes_less_than_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_widths, "TURNS", 3)
    chain = bench_widths.CHAINS["3x3, 3x3: 64-w-64 at 28 x 28"]
    seconds = bench_widths.staircase(
        [bench_widths.build(chain, width) for width in (64, 16)], {"x": np.ones(chain.shape, np.float32)}
    )
    assert seconds.shape == (3, 2) and (seconds[:, 1] < seconds[:, 0]).all()
