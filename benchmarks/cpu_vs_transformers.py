"""Output tokens/s of the default model in float32 on a CPU, beside transformers, in one run.

    python benchmarks/cpu_vs_transformers.py --peer-python PATH [--rounds 5] [--threads 2] [--out FILE]

PATH is an interpreter that has torch, transformers and gguf (transformers is no dependency of ours). Prompt of 32
random tokens, 128 new tokens, greedy, end of sequence ignored, wall time with the prefill, batch 1 and 8. Both stay
loaded in processes of their own and take turns, so that a busy spell of the machine meets both; the median of the
rounds after a warm-up round is reported, and the ratio of the medians.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMPT_LEN, NEW_TOKENS, BATCHES, VOCAB = 32, 128, (1, 8), 49152


def prompts(batch: int, seed: int) -> list[list[int]]:
    r = random.Random(seed)
    return [[r.randrange(3, VOCAB) for _ in range(PROMPT_LEN)] for _ in range(batch)]


def serve_rounds(run) -> None:
    """A worker: reads "batch seed" lines, answers each with seconds and the tokens it made."""
    print("ready", flush=True)
    for line in sys.stdin:
        batch, seed = map(int, line.split())
        start = time.perf_counter()
        tokens = run(prompts(batch, seed))
        print(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens}), flush=True)


def work_jaxserve() -> None:
    from jaxserve import Engine, SamplingParams
    from jaxserve.checkpoint.resolve import DEFAULT_MODEL

    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    engine = Engine.from_pretrained(DEFAULT_MODEL, dtype="float32", max_model_len=1024, prefix_caching=False)
    serve_rounds(lambda batch: [c.token_ids for c in engine.generate(batch, params)])


def work_transformers(path: str, threads: int) -> None:
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(threads)
    folder, name = os.path.split(path)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    # Ignores end of sequence, as ours does; min_new_tokens would suppress it, which gives other tokens.
    model.generation_config.eos_token_id = None

    def run(batch):
        ids = torch.tensor(batch)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                pad_token_id=2,
            )
        return out[:, PROMPT_LEN:].tolist()

    serve_rounds(run)


def start(python: str, role: str, env: dict[str, str], *arguments: str) -> subprocess.Popen:
    command = [python, __file__, "--role", role, *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    while (line := process.stdout.readline()) != "ready\n":
        if not line:
            raise SystemExit(f"the {role} worker ended with status {process.wait()}")
    return process


def ask(process: subprocess.Popen, batch: int, seed: int) -> dict:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{batch} {seed}\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="interpreter with torch, transformers and gguf")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--role", choices=["jaxserve", "transformers"], help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "jaxserve":
        return work_jaxserve()
    if args.role == "transformers":
        return work_transformers(args.model, args.threads)
    if not args.peer_python:
        parser.error("--peer-python is needed")

    import rich.console

    from jaxserve.bench.environment import environment
    from jaxserve.checkpoint.resolve import DEFAULT_MODEL, resolve_model

    console = rich.console.Console(stderr=True)
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": str(Path(__file__).parents[1])}
    with console.status("loading both"):
        ours = start(sys.executable, "jaxserve", env)
        peer = start(args.peer_python, "transformers", env, "--model", str(resolve_model(DEFAULT_MODEL)))
    rows = []
    for batch in BATCHES:
        seconds: dict[str, list[float]] = {"jaxserve": [], "transformers": []}
        agree = 0
        for i in range(args.rounds + 1):
            a, b = ask(ours, batch, seed=i), ask(peer, batch, seed=i)
            agree += a["tokens"] == b["tokens"]
            if i:  # the first round warms both up
                seconds["jaxserve"].append(a["seconds"])
                seconds["transformers"].append(b["seconds"])
        rate = {k: batch * NEW_TOKENS / statistics.median(v) for k, v in seconds.items()}
        row = {
            "batch": batch,
            "jaxserve_tokens_per_s": round(rate["jaxserve"], 1),
            "transformers_tokens_per_s": round(rate["transformers"], 1),
            "ratio": round(rate["jaxserve"] / rate["transformers"], 2),
            "rounds_with_equal_tokens": f"{agree}/{args.rounds + 1}",
            "seconds": {k: [round(x, 3) for x in v] for k, v in seconds.items()},
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    for process in (ours, peer):
        process.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]
        process.wait()
    if args.out:
        command = "python benchmarks/cpu_vs_transformers.py --peer-python PATH"
        record = {"benchmark": "cpu_vs_transformers", "command": command, "threads": args.threads, **environment()}
        args.out.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
