"""A small scheduler, its requests, and a stand-in for sampling whose tokens follow from those before."""

import zlib

from hf_paged.core.request import Request
from hf_paged.core.scheduler import GroupSpec, Scheduler


def make(block_size=4, max_blocks=64, **limits) -> Scheduler:
    defaults = dict(max_batch_tokens=64, max_num_seqs=8, max_model_len=256, prefix_cache=False)
    return Scheduler(
        groups=[GroupSpec(None)],
        block_size=block_size,
        num_blocks=[1],
        max_blocks=[max_blocks],
        **{**defaults, **limits},
    )


def add(scheduler, name, prompt, max_tokens=4, **options) -> Request:
    """`prompt`: the tokens, or how many of them."""
    if isinstance(prompt, int):
        prompt = [1000 * (ord(name[0]) - 96) + i for i in range(prompt)]
    request = Request(request_id=name, prompt_token_ids=list(prompt), max_tokens=max_tokens, **options)
    scheduler.add(request)
    return request


def sample(token_ids, index=0) -> int:
    return zlib.crc32(repr((token_ids, index)).encode())


def expected(request, index=0) -> list[int]:
    """The output of a request that nothing but max_tokens ends."""
    tokens = list(request.prompt_token_ids)
    for _ in range(request.max_tokens):
        tokens.append(sample(tokens, index))
    return tokens[len(request.prompt_token_ids) :]
