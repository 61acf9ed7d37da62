"""How well a model predicts a text: perplexity by a sliding window, through the engine's own prompt
log-probabilities."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxserve.engine.engine import Engine

LONGEST_WINDOW = 1024  # by default: longer ones cost more and few texts profit
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """What a text's tokens cost. ``num_scored`` of ``num_tokens`` were predicted: all but the first."""

    perplexity: float
    nll: float  # mean negative log-likelihood of a token, nats
    num_tokens: int
    num_scored: int
    num_windows: int
    window: int
    stride: int


def windows(num_tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first scored) of each window; every token but the first is scored once, and after the first window
    with at least ``window - stride`` tokens before it."""
    start, scored = 0, 1
    while scored < num_tokens:
        stop = min(start + window, num_tokens)
        yield start, stop, scored
        scored = stop
        start += stride


def perplexity(
    engine: "Engine",
    token_ids: list[int],
    *,
    window: int | None = None,
    stride: int | None = None,
    on_progress: Progress | None = None,
) -> Perplexity:
    """The perplexity of ``token_ids``, at least two.

    Args:
        window: tokens that are seen at once; None is 1024, or what the engine has room for.
        stride: tokens from a window's start to the next one's; None is half a window.
        on_progress: called with ("evaluate", windows done, windows in all).

    Raises:
        ValueError: a number is out of its range (with both); the text is too short.
    """
    longest = engine.scheduler_config.max_model_len - 1  # a token is put out at the least
    window = min(LONGEST_WINDOW, longest) if window is None else window
    if not 2 <= window <= longest:
        raise ValueError(f"window={window} is not between 2 and {longest}, the tokens of a prompt at most")
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride < window:
        raise ValueError(f"stride={stride} is not between 1 and {window - 1}: window={window}")
    if len(token_ids) < 2:
        raise ValueError(f"the text has {len(token_ids)} tokens, at least 2 are needed")
    spans = list(windows(len(token_ids), window, stride))
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    total, num_scored, block = 0.0, 0, 4 * engine.scheduler_config.max_num_seqs
    for first in range(0, len(spans), block):
        if on_progress is not None:
            on_progress("evaluate", first, len(spans))
        some = spans[first : first + block]
        completions = engine.generate([token_ids[start:stop] for start, stop, _ in some], params)
        for (start, _, scored), completion in zip(some, completions, strict=True):
            assert completion.prompt_logprobs is not None
            found = [entry.logprob for entry in completion.prompt_logprobs[scored - start :] if entry is not None]
            total -= math.fsum(found)
            num_scored += len(found)
    if on_progress is not None:
        on_progress("evaluate", len(spans), len(spans))
    nll = total / num_scored
    return Perplexity(
        perplexity=math.exp(nll) if nll < 700 else math.inf,
        nll=nll,
        num_tokens=len(token_ids),
        num_scored=num_scored,
        num_windows=len(spans),
        window=window,
        stride=stride,
    )
