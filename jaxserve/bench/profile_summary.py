"""What a jax.profiler trace says of a device's time: kernels by name, and the share in which nothing ran."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.profiler import ProfileData


class Interval(NamedTuple):
    name: str
    start_ns: float
    duration_ns: float


def planes_of(folder: Path) -> list[Any]:
    """Planes of the newest trace under ``folder``."""
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    return list(ProfileData.from_file(str(newest)).planes)


def kernels(folder: Path) -> dict[str, list[Interval]]:
    """Intervals of each device's plane of the newest trace under ``folder``; of a CPU, what XLA's own threads ran."""
    planes = planes_of(folder)
    devices = [p for p in planes if p.name.startswith("/device:") and "CUSTOM" not in p.name]
    found = {p.name: [x for line in p.lines if _is_stream(line.name) for x in _intervals(line)] for p in devices}
    if any(found.values()):
        return {name: x for name, x in found.items() if x}
    host = [line for p in planes if p.name == "/host:CPU" for line in p.lines if "XLA" in line.name]
    return {"/host:CPU": [x for line in host for x in _intervals(line) if not x.name.startswith("ThunkExecutor")]}


def without_number(name: str) -> str:
    """``fusion_3`` and ``fusion.7`` are ``fusion``."""
    return re.sub(r"[._]\d+$", "", name)


def _is_stream(line: str) -> bool:
    """A GPU's streams, a TPU's operations: other lines of the plane repeat the same time by module or source."""
    return line.startswith("Stream") or line == "XLA Ops"


def _intervals(line: Any) -> Iterable[Interval]:
    return (Interval(e.name, e.start_ns, e.duration_ns) for e in line.events if e.duration_ns > 0)


def summary(intervals: Sequence[Interval], step_s: float) -> dict[str, Any]:
    """Time of kernels by name a step, numbers at the names' ends left out; and the time between first start and last
    end in which none ran, by the length of the gap.

    Args:
        step_s: seconds of one step, of which a trace has no whole number: it begins and ends inside one.
    """
    ordered = sorted(intervals, key=lambda x: x.start_ns)
    if not ordered:
        return {"num_kernels": 0}
    gaps, busy, end = [], 0.0, ordered[0].start_ns
    for x in ordered:
        if x.start_ns > end:
            gaps.append(x.start_ns - end)
        busy += max(0.0, x.start_ns + x.duration_ns - max(end, x.start_ns))
        end = max(end, x.start_ns + x.duration_ns)
    span = end - ordered[0].start_ns
    num_steps = span / (step_s * 1e9)
    by_name: dict[str, list[float]] = {}
    for x in ordered:
        by_name.setdefault(without_number(x.name), []).append(x.duration_ns)
    names = sorted(by_name, key=lambda name: -sum(by_name[name]))
    limits = (2_000, 10_000, 50_000, float("inf"))
    return {
        "num_steps": num_steps,
        "num_kernels": len(ordered),
        "kernels_a_step": len(ordered) / num_steps,
        "span_us_a_step": step_s * 1e6,
        "busy_us_a_step": busy / num_steps / 1e3,
        "idle_share": 1 - busy / span if span else 0.0,
        "idle_us_a_step_by_gap": {
            f"under {high / 1e3:g} us": sum(g for g in gaps if low <= g < high) / num_steps / 1e3
            for low, high in zip((0, *limits), limits, strict=False)
        },
        "longest_gaps_us": [round(g / 1e3, 1) for g in sorted(gaps)[:-17:-1]],
        "kernels": [
            {
                "name": name[:120],
                "us_a_step": sum(by_name[name]) / num_steps / 1e3,
                "calls_a_step": len(by_name[name]) / num_steps,
                "mean_us": sum(by_name[name]) / len(by_name[name]) / 1e3,
                "share_of_busy": sum(by_name[name]) / busy if busy else 0.0,
            }
            for name in names[:40]
        ],
    }


def lines(found: dict[str, Any], top: int = 14) -> list[str]:
    """The summary for people."""
    if not found["num_kernels"]:
        return ["  no kernel in the trace"]
    gaps = ", ".join(f"{name} {us:.1f}" for name, us in found["idle_us_a_step_by_gap"].items())
    out = [
        f"  {found['num_steps']:.1f} steps: {found['span_us_a_step']:.0f} us a step, "
        f"busy {found['busy_us_a_step']:.0f}, idle {found['idle_share']:.1%} (us a step in gaps {gaps}), "
        f"{found['kernels_a_step']:.0f} kernels a step",
    ]
    out += [
        f"  {k['us_a_step']:9.1f} us {k['share_of_busy']:6.1%} {k['calls_a_step']:6.1f} x {k['mean_us']:8.1f}  "
        f"{k['name'][:70]}"
        for k in found["kernels"][:top]
    ]
    return out
