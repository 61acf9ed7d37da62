"""The tables that people read: a few of the rows' figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

FIGURES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "batching": (
        ("requests/s", "requests_per_s", ".2f"),
        ("output tokens/s", "output_tokens_per_s", ".1f"),
        ("latency p50, s", "latency_p50_s", ".2f"),
        ("latency p99, s", "latency_p99_s", ".2f"),
        ("steps", "num_steps", "d"),
        ("step p50, s", "step_p50_s", ".3f"),
        ("active rows a step, mean", "active_rows_mean", ".2f"),
    ),
    "allocation": (
        ("KV utilisation, mean", "kv_utilisation_mean", ".1%"),
        ("KV utilisation, peak", "kv_utilisation_peak", ".1%"),
        ("reserved, mean", "kv_reserved_mean", ".1%"),
        ("internal fragmentation, mean", "kv_internal_fragmentation_mean", ".1%"),
        ("unallocated, mean", "kv_unallocated_mean", ".1%"),
        ("sequences at once, mean", "running_mean", ".2f"),
        ("sequences at once, peak", "running_peak", "d"),
        ("preemptions", "num_preemptions", "d"),
        ("requests/s", "requests_per_s", ".2f"),
        ("output tokens/s", "output_tokens_per_s", ".1f"),
    ),
}  # comparison -> (label, key of the row, format)


def print_batching(rows: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """The rows of ``bench.batching.run`` as two tables and the lines that say what they were measured on and how."""
    console = console or Console()
    row = rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    lines = (
        f"{row['model']}, {row['dtype']}, {row['device']}",
        f"{versions}, commit {row['commit'] or 'unknown'}",
        f"{row['num_requests']} requests, all there at the start: {row['prompt_tokens']} prompt and "
        f"{row['output_tokens']} output tokens, log-normal lengths up to {row['max_prompt']} and {row['max_output']}",
    )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    for comparison, figures in FIGURES.items():
        first, second = (r for r in rows if r["comparison"] == comparison)
        console.print(_table(first, second, figures))
    for r in rows:
        if r["comparison"] == "allocation" and r["running_peak"] == r["max_num_seqs"]:
            console.print(f"{r['mode']} allocation used all its slots: memory was not its only limit", highlight=False)
    loads = ", ".join(f"{r['load_average']:.1f}" for r in rows)
    console.print(f"load average of the machine after each run: {loads}", highlight=False)
    same = all(r["identical_tokens"] for r in rows)
    console.print(
        "all four runs returned identical greedy tokens"
        if same
        else "the runs' greedy tokens differ in places: arithmetic below float32 rounds by shape"
    )
    console.print(f"$ {row['command']}", highlight=False, soft_wrap=True)


def _table(first: Mapping[str, Any], second: Mapping[str, Any], figures: Sequence[tuple[str, str, str]]) -> Table:
    memory = (
        f"{first['num_pages']} pages of {first['page_size']} tokens, {first['kv_bytes'] / 2**20:.0f} MiB; "
        f"{first['max_num_seqs']} slots; max_model_len {first['max_model_len']}"
    )
    table = Table(title=f"{first['mode']} against {second['mode']} {first['comparison']}", title_justify="left")
    table.caption, table.caption_justify = memory, "left"
    table.add_column("")
    for name in (first["mode"], second["mode"], f"{first['mode']} / {second['mode']}"):
        table.add_column(name, justify="right", no_wrap=True)
    for label, key, form in figures:
        a, b = first[key], second[key]
        values = ["none waited" if x is None else format(x, form) for x in (a, b)]
        table.add_row(label, *values, f"{a / b:.2f}" if a is not None and b else "-")
    return table


# workload -> (column, key of the row, format); a figure that a row does not have is a dash.
ENGINE_FIGURES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "latency": (("TTFT ms", "ttft_ms", ".2f"), ("p99", "ttft_ms_p99", ".2f")),
    "decode": (
        ("TPOT ms", "tpot_ms", ".2f"),
        ("step p50", "step_ms_p50", ".2f"),
        ("p99", "step_ms_p99", ".2f"),
        ("tokens/s", "output_tokens_per_s", ",.0f"),
    ),
    "prefill": (("tokens/s", "prompt_tokens_per_s", ",.0f"),),
    "throughput": (
        ("tokens/s", "output_tokens_per_s", ",.0f"),
        ("requests/s", "requests_per_s", ".2f"),
        ("ITL p50", "itl_ms_p50", ".2f"),
        ("p99", "itl_ms_p99", ".2f"),
    ),
}
ENGINE_COMMON = (
    ("% roof", "roofline_percent", ".1f"),
    ("GB/s", "gb_per_s", ",.0f"),
    ("TFLOP/s", "tflop_per_s", ",.1f"),
    ("host ms", "host_ms_p50", ".3f"),
    ("dispatch", "dispatch_ms_p50", ".3f"),
)
MESH_FIGURES = (  # of decode, where there is more than one device; sent bytes are of all of them in a step
    ("step p50", "step_ms_p50", ".2f"),
    ("tick p50", "tick_ms_p50", ".2f"),
    ("bubble %", "bubble_percent", ".1f"),
    ("textbook", "textbook_bubble_percent", ".1f"),
    ("stage MB", "stage_mb_a_step", ",.3f"),
    ("tensor MB", "tensor_mb_a_step", ",.3f"),
)


def _about(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """What a row with ``ceilings`` was measured on."""
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    driver = f", driver {row['driver']}" if row["driver"] else ""
    ceilings = row["ceilings"]
    return (
        f"{name}, {row['dtype']}, {row['device']}{driver}",
        f"{versions}, commit {row['commit'] or 'unknown'}",
        f"measured ceilings: {ceilings['read_gb_per_s']:,.0f} GB/s of reading, {ceilings['tflop_per_s']:,.2f} TFLOP/s "
        f"in {ceilings['dtype']}",
    )


def print_engine(rows: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """The rows of ``bench.engine.run``: a table for each workload, and what they were measured on and how."""
    console = console or Console()
    row = rows[0]
    for line in _about(row, row["model"]):
        console.print(line, highlight=False, soft_wrap=True)
    for start in (r for r in rows if r["workload"] == "start"):
        stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in start["stages_s"].items())
        console.print(f"start {start['start_s']:.1f} s: {stages}", highlight=False, soft_wrap=True)
    batch, prompt = ("batch", "batch_size", "d"), ("prompt", "prompt_len", "d")
    for workload, figures in ENGINE_FIGURES.items():
        measured = [r for r in rows if r["workload"] == workload]
        if measured:
            console.print(_columns(workload, measured, (batch, prompt, *figures, *ENGINE_COMMON)))
    if on_mesh := [r for r in rows if "tensor_mb_a_step" in r]:
        console.print(_columns(f"decode on {row['mesh']}", on_mesh, (batch, *MESH_FIGURES)))
    console.print(f"$ {row['command']}", highlight=False, soft_wrap=True)


def _columns(title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[tuple[str, str, str]]) -> Table:
    """A table of those ``columns`` (name, key of the row, format) that the first row has."""
    table = Table(title=title, title_justify="left")
    present = [c for c in columns if c[1] in rows[0]]
    for name, _, _ in present:
        table.add_column(name, justify="right")
    for r in rows:
        table.add_row(*("-" if r[key] is None else format(r[key], form) for _, key, form in present))
    return table


# What a row is of, and in what words.
KERNEL_ABOUT = {
    "matrix": "",
    "rows": "rows",
    "tokens": "tokens",
    "new_tokens": "new tokens",
    "keys": "keys",
    "window": "a window",
}
KERNEL_FIGURES = (
    ("us", "us", ".1f"),
    ("% roof", "roofline_percent", ".1f"),
    ("GB/s", "gb_per_s", ",.0f"),
    ("TFLOP/s", "tflop_per_s", ",.2f"),
)


def print_kernels(rows: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """The rows of ``bench.kernels.run``: a table for each kernel, and what they were measured on and how. What the
    device's engine would choose has a star; "/ ref." is how many times as fast as the reference it is."""
    console = console or Console()
    for line in _about(rows[0], rows[0]["shapes"]):
        console.print(line, highlight=False, soft_wrap=True)
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        table = Table(title=kernel, title_justify="left", box=None, pad_edge=False)
        table.add_column("of", no_wrap=True)
        table.add_column("by", no_wrap=True)
        for label in ("us", "/ ref.", *(label for label, _, _ in KERNEL_FIGURES[1:])):
            table.add_column(label, justify="right")
        reference_us: dict[str, float] = {}
        for row in (r for r in rows if r["kernel"] == kernel):
            about = [f"{row[name]} {word}" for name, word in KERNEL_ABOUT.items() if row.get(name) is not None]
            of = ", ".join(x.strip() for x in about)
            by = row["implementation"] + (" *" if row["selected"] else "")
            if "error" in row:
                table.add_row(of, by, row["error"])
                continue
            if row["implementation"] == "reference":
                reference_us[of] = row["us"]
            ratio = f"{reference_us[of] / row['us']:.2f}" if of in reference_us else "-"
            us, *others = (format(row[key], form) for _, key, form in KERNEL_FIGURES)
            table.add_row(of, by, us, ratio, *others)
        console.print(table)
    console.print(f"$ {rows[0]['command']}", highlight=False, soft_wrap=True)


def print_rows(
    rows: Sequence[Mapping[str, Any]], figures: Sequence[tuple[str, str]], console: Console | None = None
) -> None:
    """``rows`` as the columns of a table, and what they were measured on and how.

    Args:
        figures: (label, key of the row); a figure that a row does not have is a dash.
    """
    console = console or Console()
    row = rows[0]
    table = Table(title=f"{row['model']}, {row['device']}, commit {row['commit'] or 'unknown'}", title_justify="left")
    table.show_header = False
    for _ in range(1 + len(rows)):
        table.add_column(justify="right")
    for label, key in figures:
        table.add_row(label, *("-" if r.get(key) is None else str(r[key]) for r in rows))
    console.print(table)
    console.print(f"$ {row['command']}", highlight=False, soft_wrap=True)
