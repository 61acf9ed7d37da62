"""What the answers of one replay amount to."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxserve.loadtest.replay import Answer

GOOD_TTFT_S, GOOD_TPOT_S = 1.0, 0.050


def figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """Rates, and percentiles over requests: time to first token, time per output token (from the first to the last,
    of requests with two or more), inter-token latency (the wait for each message after the first), whole answers.

    Goodput counts the requests that were answered whole with a first token within ``GOOD_TTFT_S`` and no more than
    ``GOOD_TPOT_S`` a token.
    """
    whole = [a for a in answers if a.error is None]
    first_due = min(a.due for a in answers)
    last = max((a.messages[-1][0] for a in answers if a.messages), default=first_due)
    duration_s = max(last - first_due, 1e-9)
    ttft = [a.messages[0][0] - a.due for a in whole]
    tpot = [_tpot(a) for a in whole if len(a.tokens) > 1]
    itl = [b[0] - a[0] for answer in whole for a, b in zip(answer.messages, answer.messages[1:], strict=False)]
    good = [a for a in whole if a.messages[0][0] - a.due <= GOOD_TTFT_S and _tpot(a) <= GOOD_TPOT_S]
    errors: dict[str, int] = {}
    for answer in answers:
        if answer.error is not None:
            errors[answer.error] = errors.get(answer.error, 0) + 1
    output_tokens = sum(len(a.tokens) for a in answers)
    row: dict[str, Any] = {
        "num_requests": len(answers),
        "num_failed": len(answers) - len(whole),
        "errors": errors,
        "duration_s": round(duration_s, 3),
        "prompt_tokens": sum(a.prompt_len for a in answers),
        "output_tokens": output_tokens,
        "requests_per_s": round(len(whole) / duration_s, 3),
        "output_tokens_per_s": round(output_tokens / duration_s, 2),
        "goodput_requests_per_s": round(len(good) / duration_s, 3),
        "goodput_share": round(len(good) / len(answers), 4),
        "client_late_p99_ms": _percentile([a.sent - a.due for a in answers if a.sent], 99),
    }
    latencies = {"ttft": ttft, "tpot": tpot, "itl": itl, "e2e": [a.messages[-1][0] - a.due for a in whole]}
    for name, values in latencies.items():
        row |= {f"{name}_p{p}_ms": _percentile(values, p) for p in (50, 90, 99)}
    return row


def _tpot(answer: Answer) -> float:
    num_after_first = len(answer.tokens) - 1
    return (answer.messages[-1][0] - answer.messages[0][0]) / num_after_first if num_after_first else 0.0


def _percentile(seconds: Sequence[float], percent: int) -> float | None:
    """In ms; None of nothing."""
    return round(float(np.percentile(seconds, percent)) * 1000, 3) if seconds else None
