"""Which requests an engine can serve at all."""

from jaxserve.config import CacheConfig, SchedulerConfig
from jaxserve.errors import RequestError
from jaxserve.request import Request
from jaxserve.step_io import StepDims


def check_request(request: Request, cache: CacheConfig, config: SchedulerConfig, dims: StepDims) -> None:
    """Raises RequestError, with both numbers, if ``request`` could never be served."""
    prompt_len, total_len = len(request.prompt_token_ids), request.max_total_len
    capacity = cache.num_pages * cache.page_size
    if prompt_len < 1:
        raise RequestError("prompt_token_ids", "the prompt is empty")
    if total_len > config.max_model_len:
        raise RequestError("max_total_len", f"{total_len} is more than max_model_len={config.max_model_len}")
    if prompt_len >= total_len:
        raise RequestError(
            "prompt_token_ids", f"{prompt_len} prompt tokens leave no room for output in {total_len} in all"
        )
    if total_len > capacity:
        raise RequestError(
            "max_total_len",
            f"{total_len} tokens do not fit the KV cache of {capacity} ({cache.num_pages} pages of {cache.page_size})",
        )
    if request.params.min_tokens > 0 and len(request.stop_token_ids) > dims.max_stop_ids:
        raise RequestError(
            "stop_token_ids",
            f"{len(request.stop_token_ids)} stop ids, end-of-sequence included, are more than the "
            f"{dims.max_stop_ids} that min_tokens={request.params.min_tokens} can hold back",
        )
    if request.params.n > config.max_num_waiting:
        raise RequestError("n", f"{request.params.n} is more than max_num_waiting={config.max_num_waiting}")
    for name in ("logprobs", "prompt_logprobs"):
        if (asked := getattr(request.params, name) or 0) > dims.max_logprobs:
            raise RequestError(name, f"{asked} is more than max_logprobs={dims.max_logprobs}; -1 is all")
