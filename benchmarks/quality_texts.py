"""The texts that quantized models are calibrated with and judged by (benchmarks/notes/quantization.md), made again:

    python benchmarks/quality_texts.py prose FOLDER debian-reference.en.txt.gz    # Debian's package debian-reference-en
    python benchmarks/quality_texts.py code FOLDER PYTHON_3_12_LIB

Prose: the Debian Reference's paragraphs without its tables; the last quarter is held out, of the rest every fifth is
for calibration. Code: three files of this repository at a commit, which no model has seen, are held out, and parts of
Python's standard library are for calibration. Writes FOLDER/{prose,code}_{eval,cal}.txt and prints their SHA-256.
"""

import gzip
import hashlib
import re
import subprocess
import sys
from pathlib import Path

COMMIT = "1b5a5f0"
HELD_OUT = ("jaxserve/scheduler/scheduler.py", "jaxserve/engine/engine.py", "jaxserve/server/codec.py")
LIBRARY = (
    "argparse.py", "asyncio/base_events.py", "dataclasses.py", "textwrap.py", "statistics.py", "json/decoder.py",
    "inspect.py", "heapq.py",
)  # fmt: skip
LINES, CODE_BYTES = slice(59, 200), 36_000  # of each file of the library, and of all


def prose(path: Path) -> dict[str, str]:
    text = gzip.decompress(path.read_bytes()).decode()
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", text)]
    paragraphs = [p for p in paragraphs if "|" not in p and len(p) > 120 and ". . ." not in p and p[0] != "+"]
    cut = int(len(paragraphs) * 0.75)
    return {"eval": "\n\n".join(paragraphs[cut:]), "cal": "\n\n".join(paragraphs[:cut:5])}


def code(library: Path) -> dict[str, str]:
    def committed(name: str) -> str:
        return subprocess.run(["git", "show", f"{COMMIT}:{name}"], check=True, capture_output=True, text=True).stdout

    lines = [line for n in LIBRARY for line in (library / n).read_text().splitlines(keepends=True)[LINES]]
    return {"eval": "".join(map(committed, HELD_OUT)), "cal": "".join(lines).encode()[:CODE_BYTES].decode()}


if __name__ == "__main__":
    kind, folder, source = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {"prose": prose, "code": code}[kind](source).items():
        path = folder / f"{kind}_{name}.txt"
        path.write_text(text, encoding="utf-8")
        print(path, hashlib.sha256(text.encode()).hexdigest())
