"""A server under thousands of clients, good and bad, and what it has more at the end than after a warm-up of them."""

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxserve.loadtest.faults.known import Known, Site
from jaxserve.loadtest.faults.storm import KINDS, Outcomes, site_of, storm
from jaxserve.loadtest.process import Served, server_process
from jaxserve.server.client import AsyncClient

Row = dict[str, Any]
FIGURES = (
    ("clients so far", "num_clients"),
    ("seconds", "seconds"),
    ("RSS MiB", "rss_mib"),
    ("files", "num_files"),
    ("threads", "num_threads"),
    ("pages held", "num_pages_held"),
    ("requests open", "num_open"),
    ("tokens generated", "generation_tokens"),
    ("preemptions", "num_preemptions"),
    ("recompilations", "recompilations"),
)  # (column, key of the row)
FLAT = ("num_files", "num_threads")
ZERO = ("num_pages_held", "num_open", "recompilations")

NUM_KNOWN = 40  # requests that the clients choose from
MAX_PROMPT, MAX_OUTPUT = 48, 32  # tokens
# Patient clients are three of five. A stalled one takes seconds, a killed one a process.
WEIGHTS = {
    **dict.fromkeys(KINDS, 1.0),
    **{name: 6.0 for name in KINDS if name.split()[-1] in ("whole", "slow", "batch", "completion", "websocket")},
    **{"grpc stall": 0.2, "http stall": 0.2, "killed": 0.1},
}
SERVER = {"slow_reader_timeout_s": 3.0, "max_message_bytes": 2**20}  # so that no client has to send or wait for more
SETTLE_S = 30.0  # for connections to end after their clients have


def run(
    model: str,
    *,
    warm_up: int = 5_000,
    num_clients: int = 10_000,
    num_at_once: int = 64,
    num_rows: int = 5,
    seed: int = 0,
    platform: str | None = None,
    output: Path | None = None,
    on_row: Callable[[Row], None] | None = None,
    **options: Any,
) -> list[Row]:
    """A row after the warm-up, and one after each ``num_rows``-th part of the clients, when all of them have left. The
    last one has ``outcomes``.

    Args:
        warm_up: clients of the same kinds, until pools, buffers and the allocator's free lists have their sizes.
        num_clients: of all ``KINDS``, at random by ``WEIGHTS``; some of them send several requests.
        num_at_once: clients that are there at any time.
        options: keywords of ``Engine.from_pretrained``.

    Raises:
        ValueError: a number below 1, fewer clients than rows, or a model for less than ``MAX_PROMPT + MAX_OUTPUT``.
        RuntimeError: the server cannot be started, or there is no /proc.
        WrongAnswerError: a client got what it should not have got.
    """
    numbers = {"warm_up": warm_up, "num_clients": num_clients, "num_at_once": num_at_once, "num_rows": num_rows}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if num_clients < num_rows:
        raise ValueError(f"num_clients={num_clients} is less than num_rows={num_rows}")
    if not Path("/proc/self/status").exists():
        raise RuntimeError("memory, files and threads of the server are read from /proc, which is not here")

    def write(rows: Sequence[Row]) -> None:
        if output is not None:
            output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        if on_row is not None:
            on_row(rows[-1])

    with server_process(model, options, platform, **SERVER) as served:
        about = served.about | {"model": Path(model).name, "num_at_once": num_at_once, "options": options}
        served = served._replace(about=about)
        return asyncio.run(soak(served, warm_up, num_clients, num_at_once, num_rows, seed, write))


async def soak(
    served: Served,
    warm_up: int,
    num_clients: int,
    num_at_once: int,
    num_rows: int,
    seed: int,
    on_row: Callable[[Sequence[Row]], None],
    weights: Mapping[str, float] = WEIGHTS,
) -> list[Row]:
    """``run`` on a server that is there; ``on_row`` is called with the rows so far."""
    rows: list[Row] = []
    outcomes: Outcomes = Counter()
    async with AsyncClient(served.target) as client:
        known = await _known_requests(client, random.Random(seed))
        r = random.Random(seed + 1)
        names = r.choices(list(weights), list(weights.values()), k=warm_up + num_clients)
        clients = [(name, r.choice(known)) for name in names]
        started = time.monotonic()
        begin = 0
        for i in range(1 + num_rows):
            end = warm_up + i * num_clients // num_rows
            async with site_of(served.target, served.url) as site:
                outcomes.update(await storm(site, clients[begin:end], num_at_once=num_at_once, seed=seed + i))
                await _flush(site, known[0])
            measured = await _settled(client, served.pid, rows[0] if rows else None)
            begin = end
            row = served.about | {"num_clients": end, "seconds": round(time.monotonic() - started, 1)} | measured
            if i == num_rows:
                row["outcomes"] = {f"{kind}: {how}": count for (kind, how), count in sorted(outcomes.items())}
            rows.append(row | {"load_average": round(os.getloadavg()[0], 2)})
            on_row(rows)
    return rows


def complaints(rows: Sequence[Row], max_growth_mib: float) -> list[str]:
    """What is not flat from the first row to the last: lines for people."""
    first, last = rows[0], rows[-1]
    found = [f"{name}: {first[name]}, then {last[name]}" for name in FLAT if last[name] > first[name]]
    found += [f"{name}: {last[name]}, not 0" for name in ZERO if last[name]]
    if (growth := last["rss_mib"] - first["rss_mib"]) > max_growth_mib:
        num_clients = last["num_clients"] - first["num_clients"]
        each = growth * 1024 / max(num_clients, 1)
        found.append(
            f"memory: {growth:.1f} MiB more after {num_clients} clients, {each:.1f} KiB each; allowed: {max_growth_mib}"
        )
    return found


async def _known_requests(client: AsyncClient, r: random.Random) -> list[Known]:
    """Asked alone, one after another."""
    info = await client.model_info()
    if info.max_model_len < MAX_PROMPT + MAX_OUTPUT:
        raise ValueError(f"max_model_len={info.max_model_len} is less than {MAX_PROMPT} + {MAX_OUTPUT} tokens")
    found = []
    for i in range(NUM_KNOWN):
        prompt = tuple(r.randrange(info.vocab_size) for _ in range(r.randint(1, MAX_PROMPT)))
        fields = {"max_tokens": r.randint(1, MAX_OUTPUT), "temperature": r.choice([0.0, 1.0]), "seed": i}
        fields["ignore_eos"] = r.random() < 0.5
        chunks = [chunk async for chunk in client.generate(token_ids=prompt, **fields)]
        tokens = tuple(token for chunk in chunks for token in chunk.token_ids)
        found.append(Known(prompt, fields, tokens, "".join(chunk.text for chunk in chunks)))
    return found


async def _flush(site: Site, known: Known) -> None:
    """One good call each way: grpc keeps its last one, with all that it had."""
    await storm(site, [("grpc whole", known), ("http whole", known)], num_at_once=1)


async def _settled(client: AsyncClient, pid: int, first: Row | None) -> Row:
    """The figures once they are no worse than at first, or after ``SETTLE_S``."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        await asyncio.sleep(1.0)
        row = await _measured(client, pid)
        is_good = not any(row[name] for name in ZERO) and (first is None or all(row[n] <= first[n] for n in FLAT))
        if is_good or time.monotonic() > deadline:
            return row


async def _measured(client: AsyncClient, pid: int) -> Row:
    load = await client.get_load()
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "rss_mib": round(int(status["VmRSS"].split()[0]) / 1024, 1),
        "num_files": len(os.listdir(f"/proc/{pid}/fd")),
        "num_threads": int(status["Threads"]),
        "num_pages_held": load.num_pages_held,
        "num_open": load.num_running + load.num_waiting,
        "generation_tokens": load.generation_tokens,
        "num_preemptions": load.num_preemptions,
        "recompilations": load.recompilations_after_ready,
    }
