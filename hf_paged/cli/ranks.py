"""Which process this is of several that hold one model together."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

# Open MPI, Intel MPI and MPICH, MVAPICH: size, rank, rank on its machine
MPI = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
)


def rank() -> int:
    """Which of the processes that torchrun or `accelerate launch` started this is; 0 if it is alone."""
    return int(os.environ.get("RANK", 0)) if num_ranks() > 1 else 0


def num_ranks() -> int:
    """How many processes there are, which hold one model together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def adopt_mpi(environment: MutableMapping[str, str] = os.environ) -> None:
    """Under mpirun, which `accelerate launch` uses on CPU, set what torchrun would have set for this process.

    Where neither has started the others, says on stderr that this process is alone. Raises ValueError if ranks of mpirun
    have not been told where to meet.
    """
    if "WORLD_SIZE" in environment:
        return
    for size, rank, local_rank in MPI:
        if int(environment.get(size, 1)) > 1:
            if "MASTER_ADDR" not in environment or "MASTER_PORT" not in environment:
                raise ValueError("mpirun: set MASTER_ADDR and MASTER_PORT to where the ranks meet, or start them by torchrun")
            own = environment[rank]
            environment |= {"WORLD_SIZE": environment[size], "RANK": own, "LOCAL_RANK": environment.get(local_rank, own)}
            return
    if environment.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in environment:
        print(
            "hf-paged: this process is alone: on CPU, accelerate starts several only by MPI (--mpirun_hostfile); torchrun "
            "does without",
            file=sys.stderr,
        )
