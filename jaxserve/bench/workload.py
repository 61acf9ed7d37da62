"""Requests whose lengths vary as those of real traffic do, and the same ones every time."""

import random
from typing import NamedTuple

MAX_PROMPT, MAX_OUTPUT = 2048, 1024  # tokens: what the distributions below were written for


class WorkItem(NamedTuple):
    """One request: its prompt, and how many tokens it generates whatever they are."""

    prompt: tuple[int, ...]
    num_output_tokens: int


def length_varied(num_requests: int, *, seed: int, max_prompt: int, max_output: int, vocab_size: int) -> list[WorkItem]:
    """Requests with log-normal prompt and output lengths and random tokens; equal arguments, equal requests.

    With limits of 2048 and 1024, lengths are ``min(2048, max(8, int(lognormvariate(4.8, 1.1))))`` and
    ``min(1024, max(8, int(lognormvariate(5.0, 0.9))))``: medians of 122 and 148, means near 210 and 220. Other limits
    scale the whole distribution, its bounds too, so that the lengths vary by the same factors. At least 1 token.
    """
    for name, value in (("num_requests", num_requests), ("max_prompt", max_prompt), ("max_output", max_output)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    lengths, tokens = random.Random(seed), random.Random(f"tokens of {seed}")

    def scaled(mu: float, sigma: float, limit: int, unscaled_limit: int) -> int:
        scale = limit / unscaled_limit
        return min(limit, max(1, int(8 * scale), int(lengths.lognormvariate(mu, sigma) * scale)))

    items = []
    for _ in range(num_requests):
        prompt_len = scaled(4.8, 1.1, max_prompt, MAX_PROMPT)
        num_output_tokens = scaled(5.0, 0.9, max_output, MAX_OUTPUT)
        items.append(WorkItem(tuple(tokens.randrange(vocab_size) for _ in range(prompt_len)), num_output_tokens))
    return items
