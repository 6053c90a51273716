"""How many replicas there should be."""

from __future__ import annotations

from ray.serve.config import AutoscalingContext

SEQUENCES = "sequences"  # that run or wait in a replica's engine; what replicas report


def by_sequences(context: AutoscalingContext) -> tuple[float, dict]:
    """As many as have `target_ongoing_requests` sequences each; Ray Serve applies bounds and delays.

    Sequences, not requests, since they are what fills an engine: a request may have many (`n`, several prompts), and one in
    the background has no connection that Ray could count. Requests that wait for a replica count as one each.
    """
    reported = (context.aggregated_metrics or {}).get(SEQUENCES, {})
    total = sum(reported.values()) + (context.total_queued_requests or 0)
    return total / context.config.get_target_ongoing_requests(), {}
