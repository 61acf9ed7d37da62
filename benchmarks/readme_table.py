"""The README's table of an engine's figures on a GPU, from a record: ``python -m benchmarks.readme_table`` writes it.

A test compares the README with what this makes: a figure there is a figure in a record.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECORD = "benchmarks/results/engine_h100_2026-11-28_run7.json"
BEGIN, END = "<!-- begin of benchmarks/readme_table.py -->\n", "<!-- end of benchmarks/readme_table.py -->\n"
# Measured by us on the same kind of card on another day: there is no record of it here.
VLLM = {
    "tpot": {1: 6.51, 8: 6.94, 16: 7.10, 32: 7.67, 64: 9.62, 128: 13.30, 256: 20.29},
    "ttft": {128: 12.5, 1024: 32.2, 4096: 100.6},
    "prefill": 41_700,
    "throughput": 8_600,
    "start": 101,
}


def table(record: dict[str, Any]) -> str:
    """Markdown of a record of ``jaxserve bench engine`` or ``benchmarks/engine_on_device.py``, with vLLM's column."""
    rows = record["results"]

    def of(workload: str, key: str) -> dict[int, dict[str, Any]]:
        return {row.get(key, 0): row for row in rows if row["workload"] == workload}

    def joined(values: Any, form: str) -> str:
        return " / ".join(format(value, form) for value in values)

    decode, latency = of("decode", "batch_size"), of("latency", "prompt_len")
    [prefill], [throughput], [start] = (list(of(w, "-").values()) for w in ("prefill", "throughput", "start"))
    sizes, lens = sorted(decode), sorted(latency)
    lines = [
        ("", "jaxserve", "% of roofline", "vLLM"),
        ("---",) * 4,
        (
            f"step that decodes {joined(sizes, 'd')} rows, ms",
            joined((decode[n]["step_ms_p50"] for n in sizes), ".2f"),
            joined((decode[n]["roofline_percent"] for n in sizes), ".0f"),
            "",
        ),
        (
            f"time per output token, batch {joined(sizes, 'd')}, ms",
            joined((decode[n]["tpot_ms"] for n in sizes), ".2f"),
            "",
            joined((VLLM["tpot"][n] for n in sizes), ".2f"),
        ),
        (
            f"time to first token, prompt {joined(lens, 'd')}, ms",
            joined((latency[n]["ttft_ms"] for n in lens), ".1f"),
            joined((latency[n]["roofline_percent"] for n in lens), ".0f"),
            joined((VLLM["ttft"][n] for n in lens), ".1f"),
        ),
        (
            "prompt tokens/s, 16 x 2048",
            f"{prefill['prompt_tokens_per_s']:,.0f}",
            f"{prefill['roofline_percent']:.0f}",
            f"{VLLM['prefill']:,}",
        ),
        (
            f"output tokens/s, {throughput['num_requests']} requests of varied lengths at once",
            f"{throughput['output_tokens_per_s']:,.0f}",
            f"{throughput['roofline_percent']:.0f}",
            f"{VLLM['throughput']:,}",
        ),
        ("start, nothing cached", f"{start['start_s']:.0f} s", "", f"{VLLM['start']} s"),
    ]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def with_table(readme: str, made: str) -> str:
    """``readme`` with ``made`` between the two marks. Raises ValueError where they are not there."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no place for the table: {BEGIN.strip()} ... {END.strip()}")
    return before + begin + made + end + after


def main() -> None:
    path = ROOT / "README.md"
    made = table(json.loads((ROOT / RECORD).read_text(encoding="utf-8")))
    path.write_text(with_table(path.read_text(encoding="utf-8"), made), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
