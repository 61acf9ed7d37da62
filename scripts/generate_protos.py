"""Writes the Python stubs of protos/jaxserve/v1 into jaxserve/server/v1 (or --out DIR), with grpcio-tools.

The stubs are committed; a test regenerates them and compares. Use the grpcio-tools version of constraints.txt: protoc
writes its version into what it generates, and the stubs need a protobuf and a grpcio at least as new as the tools.

protoc's Python imports follow the proto package ("from jaxserve.v1 import ..."), which is not where the stubs live:
those lines are rewritten to package-relative imports, and nothing else is.
"""

import argparse
import re
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
OUT = ROOT / "jaxserve" / "server" / "v1"


def generate(out: Path) -> list[Path]:
    """Writes the stubs of every proto of jaxserve/v1 into ``out`` and returns their paths."""
    sources = sorted(str(p.relative_to(PROTOS)) for p in (PROTOS / "jaxserve" / "v1").glob("*.proto"))
    with tempfile.TemporaryDirectory() as tmp:
        outputs = [f"--{kind}_out={tmp}" for kind in ("python", "pyi", "grpc_python")]
        if code := protoc.main(["protoc", f"-I{PROTOS}", *outputs, *sources]):
            raise SystemExit(code)
        out.mkdir(parents=True, exist_ok=True)
        written = []
        for stub in sorted((Path(tmp) / "jaxserve" / "v1").iterdir()):
            text = re.sub(r"^from jaxserve\.v1 import", "from . import", stub.read_text(), flags=re.MULTILINE)
            written.append(out / stub.name)
            written[-1].write_text(text)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the Python stubs of protos/jaxserve/v1.")
    parser.add_argument("--out", type=Path, default=OUT, help="default: jaxserve/server/v1")
    for path in generate(parser.parse_args().out):
        print(path)


if __name__ == "__main__":
    main()
