"""How much a scheduler has before it, in prompt tokens: what ``routing`` compares."""

from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.waiting import OUTPUT_WEIGHT, PROMPT_WEIGHT

# Output tokens, at most, that an unfinished sequence is taken to have before it, however many it has had. How many it
# will have nobody knows: ``max_tokens`` is a bound that few reach, and often all of the context. Chat answers are of
# this order.
EXPECTED_OUTPUT = 128


class Load:
    """The sum over a scheduler's unfinished sequences. A sequence counts the tokens of its prompt that were not cached
    when it was queued, until its first token is there, and ``OUTPUT_WEIGHT`` for each token of its expected output,
    until it ends. Belongs to the Scheduler.

    Attributes:
        tokens: the sum.
    """

    def __init__(self):
        self.tokens = 0
        self._parts: dict[Sequence, tuple[int, int]] = {}  # of its prompt and of its output

    def add(self, sequence: Sequence, num_cached: int) -> None:
        """``sequence`` is queued. ``num_cached``: tokens of its prompt that it will not compute."""
        num_output = min(EXPECTED_OUTPUT, sequence.request.max_total_len - sequence.prompt_len)
        parts = PROMPT_WEIGHT * (sequence.prompt_len - num_cached), OUTPUT_WEIGHT * num_output
        self._parts[sequence] = parts
        self.tokens += sum(parts)

    def has_first_token(self, sequence: Sequence) -> None:
        """Its prompt is computed."""
        of_prompt, of_output = self._parts[sequence]
        self._parts[sequence] = (0, of_output)
        self.tokens -= of_prompt

    def remove(self, sequence: Sequence) -> None:
        """It has ended."""
        self.tokens -= sum(self._parts.pop(sequence))
