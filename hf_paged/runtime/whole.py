"""Forwards over whole sequences, beside the engine's steps: on pages that last for one layer."""

from __future__ import annotations

from ..core.whole import WholeSequences
from .batch import SequenceHooks, StepContext
from .inputs import HostInputs
from .kv_cache import KVCache
from .packed import Owner


class PassingCache(KVCache):
    """A cache whose layers have their keys and values in the same memory, one after the other.

    Nobody reads a layer's pages after its attention: the next forward begins with the first token again.
    """

    def ensure(self, num_blocks: list[int]) -> None:
        made: dict[tuple, tuple] = {}
        for index, count in enumerate(num_blocks):
            for spec in self.groups[index].layers:
                layer = self.layers[spec.layer_idx, spec.call]
                sizes = count, spec.num_kv_heads, spec.head_dim, spec.value_dim, spec.value_in_key
                if sizes not in made:
                    self._grow_layer(layer, 0, count)
                    made[sizes] = layer.k_cache, layer.v_cache, layer.scales
                layer.k_cache, layer.v_cache, layer.scales = made[sizes]
            self.num_blocks[index] = count


def whole_context(sequences: WholeSequences, cache: PassingCache, first: int) -> StepContext:
    """The packed batch of `sequences`, ready for a model's forward. `first`: what hooks are told as the number of the first."""
    plan = sequences.plan(len(cache.groups))
    cache.ensure(plan.num_blocks)
    cache.states.ensure(plan.num_slots)
    inputs = HostInputs(cache.block_size, cache.device).prepare(plan, [], None)

    def owner(seq_id: int) -> Owner:
        row = sequences.owners[seq_id]
        return Owner(f"forward/{first + row}", 0, first + row, len(sequences.rows[row]))

    return StepContext(plan, inputs, cache, cache.backend, owner, SequenceHooks())
