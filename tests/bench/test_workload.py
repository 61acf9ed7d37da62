import random

import pytest

from jaxserve.bench.workload import length_varied


def lengths(**options: int) -> list[tuple[int, int]]:
    return [(len(item.prompt), item.num_output_tokens) for item in length_varied(**options, vocab_size=100)]


def test_full_size_is_the_published_generator():
    r = random.Random(0)
    published = [
        (min(2048, max(8, int(r.lognormvariate(4.8, 1.1)))), min(1024, max(8, int(r.lognormvariate(5.0, 0.9)))))
        for _ in range(512)
    ]
    assert lengths(num_requests=512, seed=0, max_prompt=2048, max_output=1024) == published
    assert (sum(p for p, _ in published), sum(o for _, o in published)) == (108_773, 113_401)


def test_smaller_limits_scale_every_length():
    full = lengths(num_requests=64, seed=3, max_prompt=2048, max_output=1024)
    small = lengths(num_requests=64, seed=3, max_prompt=512, max_output=128)
    assert small == [(p // 4, o // 8) for p, o in full]


def test_equal_arguments_equal_requests():
    options = {"num_requests": 9, "max_prompt": 5, "max_output": 3, "vocab_size": 7}
    items = length_varied(seed=1, **options)
    assert items == length_varied(seed=1, **options) != length_varied(seed=2, **options)
    for item in items:
        assert 1 <= len(item.prompt) <= 5 and 1 <= item.num_output_tokens <= 3 and set(item.prompt) <= set(range(7))


@pytest.mark.parametrize("name", ["num_requests", "max_prompt", "max_output"])
def test_a_size_below_one_is_refused(name: str):
    with pytest.raises(ValueError, match=f"{name}=0"):
        length_varied(**({"num_requests": 1, "seed": 0, "max_prompt": 1, "max_output": 1, "vocab_size": 5} | {name: 0}))
