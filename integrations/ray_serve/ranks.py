"""The processes that hold one replica's model together: rank 0 is the replica itself, the others are actors of its own.

They lie in the replica's placement group, which ends with it, and belong to it: Ray ends them when it dies. One that dies
ends the team (`parallel.heart`), and so the replica.
"""

from __future__ import annotations

import asyncio
import os
import socket

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from .options import Options


class Ranks:
    """Starts the other ranks. The replica calls `join` and loads its own part next.

    Args:
        options: of the replica, whose `tensor_parallel_size` is over 1.
    """

    def __init__(self, options: Options):
        group = ray.util.get_current_placement_group()
        size = options.tensor_parallel_size
        self._variables = {
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": ray.util.get_node_ip_address(),
            "MASTER_PORT": str(_free_port()),
            "LOCAL_RANK": "0",  # each sees its own device only
        }
        self._actors = []
        for rank in range(1, size):
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
            kind = _Rank.options(
                num_cpus=options.num_cpus,
                num_gpus=options.num_gpus,
                scheduling_strategy=place,
                runtime_env={"env_vars": self._variables | {"RANK": str(rank)}},
            )
            self._actors.append(kind.remote(options))
        self._runs = [actor.run.remote(rank) for rank, actor in enumerate(self._actors, 1)]

    def join(self) -> None:
        """Make this process rank 0."""
        os.environ.update(self._variables | {"RANK": "0"})

    async def until_one_ends(self) -> str:
        """What became of the first that ended."""
        ends = [asyncio.ensure_future(_end(rank, run)) for rank, run in enumerate(self._runs, 1)]
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for end in ends:
                end.cancel()

    async def ended(self, patience: float) -> None:
        """They have been told to end; wait for that, but no longer than `patience` seconds."""
        await asyncio.wait([asyncio.ensure_future(_end(rank, run)) for rank, run in enumerate(self._runs, 1)], timeout=patience)


async def _end(rank: int, run) -> str:
    try:
        await run
    except Exception as error:
        first = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
        return f"rank {rank}: {first.strip()}"
    return f"rank {rank} has ended"


@ray.remote(max_restarts=0)
class _Rank:
    def __init__(self, options: Options):
        self._options = options

    def run(self, rank: int) -> None:
        """Load this rank's part and take part in what rank 0 does, up to its end."""
        from ... import follow, unpatch
        from .loading import load

        model = load(self._options, rank)
        try:
            follow(model)
        finally:
            unpatch(model)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]
