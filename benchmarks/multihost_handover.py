"""What it costs to hand a step to the other hosts: two processes on loopback, without a device.

    python benchmarks/multihost_handover.py --output benchmarks/results/multihost_handover.json

For each size of a step: the leader's time in the three orders of a step (forward, sample, read), and the time until the
follower has taken them and its answer is back, half of which is what a step of the follower begins later.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from jaxserve.bench.environment import environment
from jaxserve.multihost.cluster import Cluster, Timeouts, join
from jaxserve.multihost.process import Process
from jaxserve.step_io import Bucket, StepDims, new_inputs

BUCKETS = (Bucket(1, 0, 0), Bucket(32, 0, 0), Bucket(256, 0, 0), Bucket(64, 8192, 64))
DIMS = StepDims(num_slots=256, max_pages_per_seq=512, num_pages=4096, page_size=16)  # 8192 tokens a sequence
STEPS, WARM_UP = 300, 30


def cluster(index: int, port: int) -> Cluster:
    return join(Process(index, 2, f"127.0.0.1:{port}"), {}, b"", Timeouts(start_s=60.0, heartbeat_s=30.0))


def follow(port: int) -> None:
    found = cluster(1, port)
    while (order := found.next_order()) is not None:
        if order[0] == "read":
            found.peers[0].send("read")


def lead(port: int, bucket: Bucket) -> dict[str, float | list[int]]:
    follower = subprocess.Popen([sys.executable, __file__, "--follow", str(port)])
    found = cluster(0, port)
    buffer, _ = new_inputs(bucket, DIMS)
    sent, back = [], []
    for _ in range(WARM_UP + STEPS):
        time.sleep(0.002)  # as a device's step takes
        before = time.perf_counter()
        found.order("forward", [*bucket], [buffer[None]])
        found.order("sample", ["any"])
        found.order("read")
        sent.append(time.perf_counter() - before)
        found.replies("read")
        back.append(time.perf_counter() - before)
    found.close()
    follower.wait()

    def quantiles(seconds: list[float]) -> tuple[float, float]:
        ordered = sorted(seconds[WARM_UP:])
        return round(1e3 * statistics.median(ordered), 4), round(1e3 * ordered[int(0.9 * len(ordered))], 4)

    leader, there_and_back = quantiles(sent), quantiles(back)
    return {
        "bucket": list(bucket),
        "bytes": buffer.nbytes,
        "leader_ms": leader[0],
        "leader_p90_ms": leader[1],
        "there_and_back_ms": there_and_back[0],
        "there_and_back_p90_ms": there_and_back[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=50080)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--follow", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.follow is not None:
        follow(arguments.follow)
        return
    rows = [lead(arguments.port + i, bucket) for i, bucket in enumerate(BUCKETS)]
    for row in rows:
        print(row)
    if arguments.output is not None:
        record = environment() | {"steps": STEPS, "results": rows}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
