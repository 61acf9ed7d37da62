"""What is read from a trace, on intervals made by hand and on a real one of this machine."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxserve.bench.profile_summary import Interval, kernels, lines, summary


def test_busy_idle_and_names():
    """Two streams: 0 to 10 and 5 to 15 overlap, then nothing until 20; a gap of 60 us before the last."""
    us = [("a_1", 0, 10), ("b.2", 5, 10), ("a_3", 20, 5), ("a", 85, 5)]
    found = summary([Interval(name, 1e3 * start, 1e3 * length) for name, start, length in us], step_s=45e-6)
    assert found["num_steps"] == pytest.approx(2) and found["num_kernels"] == 4
    assert found["idle_share"] == pytest.approx(65 / 90) and found["busy_us_a_step"] == pytest.approx(12.5)
    assert list(found["idle_us_a_step_by_gap"].values()) == pytest.approx([0, 2.5, 0, 30])
    assert found["longest_gaps_us"] == [60, 5]
    first, second = found["kernels"]
    assert (first["name"], second["name"]) == ("a", "b")
    assert (first["us_a_step"], first["calls_a_step"], first["mean_us"]) == pytest.approx((10, 1.5, 20 / 3))
    assert "idle 72.2%" in lines(found)[0] and len(lines(found)) == 3


def test_nothing_in_the_trace():
    assert lines(summary([], step_s=1)) == ["  no kernel in the trace"]


def test_a_trace_of_this_machine(tmp_path: Path):
    f = jax.jit(lambda x: jnp.sin(x @ x).sum())
    x = jnp.ones((200, 200))
    f(x).block_until_ready()
    with jax.profiler.trace(str(tmp_path)):
        for _ in range(3):
            f(x).block_until_ready()
    (intervals,) = kernels(tmp_path).values()
    found = summary(intervals, step_s=1e-3)
    assert found["num_kernels"] >= 3 and 0 <= found["idle_share"] < 1
