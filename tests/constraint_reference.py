"""What penalties, biases and forbidden tokens do to a sequence's next logits, in numpy, by their definitions."""

import numpy as np

from jaxserve.request import Request


def constrained_logits(logits: np.ndarray, request: Request, output: list[int]) -> np.ndarray:
    """``logits`` [V] in float64 as the fields of ``request`` change them after ``output``; -inf is forbidden."""
    params, prompt = request.params, list(request.prompt_token_ids)
    x = np.array(logits, np.float64)
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    for token in set(prompt + output):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(output):
        x[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    if params.allowed_token_ids is not None:
        x[[i for i in range(len(x)) if i not in params.allowed_token_ids]] = -np.inf
    for sequence in request.bad_sequences:
        before = list(sequence[:-1])
        if output[len(output) - len(before) :] == before:
            x[sequence[-1]] = -np.inf
    if len(output) < params.min_tokens:
        x[list(request.stop_token_ids)] = -np.inf
    return x
