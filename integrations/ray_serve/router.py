"""Ray Serve's choice of a replica, by the prompt's beginning."""

from __future__ import annotations

import random

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from .exchange import Call
from .prefix import PrefixTable, ranked

CAPACITY = 200_000  # keys: some tens of MiB at most


class PrefixRouter(RequestRouter):
    """Sends a request to the replica that holds what it asks for, else to one that has seen its prompt's beginning."""

    def initialize_state(self, slack: int | None) -> None:
        """
        Args:
            slack: see `prefix.ranked`; None: prompts are not looked at.
        """
        self._slack = slack
        self._table = PrefixTable(CAPACITY)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        call = pending_request.args[0] if pending_request is not None and pending_request.args else None
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # all are tried before the next look
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if not isinstance(call, Call):
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        if call.replica in replicas:  # nobody else has it
            return [[replicas[call.replica]]]
        if self._slack is None or not call.prefix:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas))), candidate_replicas]
        loads = {name: self._load(replica) for name, replica in replicas.items()}
        names = ranked(loads, call.prefix, self._table, self._slack)
        self._table.add(call.prefix, names[0])  # at once: the next one may come before this one has arrived
        return [[replicas[name]] for name in names]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result) -> None:
        call = pending_request.args[0] if pending_request.args else None
        if isinstance(call, Call) and self._slack is not None:
            self._table.add(call.prefix, replica_id.unique_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._table.keep(replica.replica_id.unique_id for replica in replicas)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._table.keep(known.unique_id for known in self.curr_replicas)

    def _load(self, replica: RunningReplica) -> int:
        """Requests that it has, as far as is known here; of one not heard of for a while that is none."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0
