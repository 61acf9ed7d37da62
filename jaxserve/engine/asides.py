"""What requests ask of a step besides its tokens: log-probabilities of the prompt, or of everything, and embeddings.

They are read off the step's hidden states by programs of their own, dispatched after the step's forward pass, or the
last tick of it, and before the next one's, and only where a row of the step asks.
"""

from typing import NamedTuple

import jax
import numpy as np

from jaxserve.engine.output import RequestOutput, all_in_order
from jaxserve.execution.hidden import SCORE_ROWS
from jaxserve.execution.runner import Runner
from jaxserve.request import TokenLogprobs
from jaxserve.sampling_params import ALL_LOGPROBS
from jaxserve.scheduler.batch import ScheduledBatch
from jaxserve.step_io import StepInputs


class _Scored(NamedTuple):
    """One token of the step, of whose hidden state log-probabilities are wanted."""

    place: int  # in [T]
    token: int  # that follows it; 0 where it is sampled, and all of [V] is wanted
    output: RequestOutput
    position: int | None  # of ``token`` in the prompt; None: it is sampled
    row: int  # in [B]


class _Pooled(NamedTuple):
    """One row of the step whose hidden states are summed."""

    output: RequestOutput
    num_tokens: int
    attempt: int  # times that the prompt was begun


class Asides:
    """What the rows of one step ask for, on its way.

    Args:
        outputs: of every row's sequence, None for one that has ended.
        inputs: of the step; read before its buffer is handed on.
    """

    def __init__(self, batch: ScheduledBatch, outputs: list[RequestOutput | None], inputs: StepInputs):
        self._scored: list[_Scored] = []
        self._pooled: list[_Pooled] = []
        self._places: list[tuple[int, int]] = []  # of each pooled row the tokens in [T], first and one after the last
        self._blocks: list[tuple[jax.Array, jax.Array]] = []
        self._sums: jax.Array | None = None
        for i, (row, output) in enumerate(zip(batch.rows, outputs, strict=True)):
            if output is None:
                continue
            request, index = row.sequence.request, batch.row_index(i)
            last = int(inputs.sample_index[index])
            first = last - row.num_new_tokens + 1
            if request.scores_prompt:
                for position in output.unscored(row.start + 1, row.start + row.num_new_tokens + 1):
                    place = first + position - 1 - row.start
                    token = request.prompt_token_ids[position]
                    self._scored.append(_Scored(place, token, output, position, index))
            if row.samples and request.params.logprobs == ALL_LOGPROBS:
                self._scored.append(_Scored(last, 0, output, None, index))
            if request.pooling is not None and (request.pooling == "mean" or row.samples):
                place = first if request.pooling == "mean" else last
                pooled = _Pooled(output, last + 1 - place, row.attempt)
                self._pooled.append(pooled)
                self._places.append((place, last + 1))

    def dispatch(self, runner: Runner) -> None:
        """Starts the programs. The step's ``forward`` was the runner's last."""
        for start in range(0, len(self._scored), SCORE_ROWS):
            block = self._scored[start : start + SCORE_ROWS]
            self._blocks.append(runner.score([s.place for s in block], [s.token for s in block]))
        if self._pooled:
            rows = np.full(runner.dims.hidden_tokens, runner.dims.num_slots, np.int32)
            for i, (first, end) in enumerate(self._places):
                rows[first:end] = i
            self._sums = runner.pool(rows)

    def read(self, runner: Runner) -> dict[int, np.ndarray]:
        """Waits, and gives the outputs what is theirs. Returns all log-probabilities [V] of the rows ([B]) that want
        them of the token that they sample."""
        in_full: dict[int, np.ndarray] = {}
        for number, handle in enumerate(self._blocks):
            block = self._scored[number * SCORE_ROWS : (number + 1) * SCORE_ROWS]
            wants_all = any(s.position is None or s.output.num_prompt_logprobs == ALL_LOGPROBS for s in block)
            scores, logprobs = runner.read_scores(handle, in_full=wants_all)
            for i, scored in enumerate(block):
                if scored.position is None:
                    assert logprobs is not None
                    in_full[scored.row] = logprobs[i]
                    continue
                k = scored.output.num_prompt_logprobs
                if k == ALL_LOGPROBS:
                    assert logprobs is not None
                    top = all_in_order(logprobs[i])
                else:
                    top = tuple(zip(scores.top_ids[i, :k].tolist(), scores.top_logprobs[i, :k].tolist()))
                entry = TokenLogprobs(token_id=scored.token, logprob=float(scores.logprobs[i]), top=top)
                scored.output.on_prompt_logprobs(scored.position, entry)
        if self._sums is not None:
            sums = runner.read_pooled(self._sums)
            for i, pooled in enumerate(self._pooled):
                pooled.output.on_pooled(sums[i], pooled.num_tokens, pooled.attempt)
        return in_full
