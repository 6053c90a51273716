"""Which positions each layer sees, asked of transformers itself.

Stock's own forward runs on some tokens while every mask that transformers' mask functions make, and every call of an
attention function, is noted. A mask is a rule over (query position, key position); it is tried on positions far beyond
the tokens that ran, so that a window of 4096 is told from full attention by a forward of a few tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from ..base.errors import UnsupportedModel

Rule = tuple[int | None, int | None]  # (window, chunk): at most one of them is set

# Keywords of attention functions that change nothing, or say what the mask says too. Flags (True, False, None) and
# names are never more than that.
_HARMLESS = frozenset("cache_position dropout logits_to_keep position_ids sliding_window".split())


@dataclass
class Visibility:
    """What the layers of one forward of stock did; see `attention.observing`.

    Attributes:
        rules: what each mask that was made says, by id of the mask; the masks themselves are kept alive here.
        layers: by `layer_idx`, the rule of each of its calls, in order.
    """

    rules: dict[int, tuple[torch.Tensor, Rule | None]] = field(default_factory=dict)
    layers: dict[int, list[Rule]] = field(default_factory=dict)

    def mask_made(self, mask: torch.Tensor | None, mask_function, local_size: int | None) -> None:
        if mask is not None:
            self.rules[id(mask)] = mask, _rule(mask_function, local_size, mask.device)

    def attended(self, module, mask: torch.Tensor | None, keywords: dict) -> None:
        """Note one call of an attention function. Raises UnsupportedModel where it is not plain causal attention."""
        name = type(module).__name__
        for keyword, value in sorted(keywords.items()):
            if keyword not in _HARMLESS and not isinstance(value, bool | str | None):
                raise UnsupportedModel(f"{name} hands {keyword!r} to its attention, which hf_paged does not know")
        # Where a mask says no more than causal, transformers may leave it out and rely on this.
        if keywords.get("is_causal", getattr(module, "is_causal", True)) is False:
            raise UnsupportedModel(f"{name} attends in both directions; only causal attention has a KV cache")
        if mask is None:
            rule = None, None
        elif id(mask) in self.rules:
            rule = self.rules[id(mask)][1]
        else:
            raise UnsupportedModel(f"{name} builds its own attention mask; hf_paged cannot tell what it hides")
        if rule is None:
            raise UnsupportedModel(f"{name} has a mask that is neither causal, nor a window, nor chunks")
        self.layers.setdefault(module.layer_idx, []).append(rule)


def _rule(mask_function, local_size: int | None, device: torch.device) -> Rule | None:
    """What `mask_function` shows a query; None if that is not all up to itself, a window or a chunk."""
    longest = 3 * (local_size or 64) + 7
    spots = {0, 1, 2, 31, 63, longest - 1}
    if local_size is not None:
        spots |= {multiple * local_size + offset for multiple in (1, 2) for offset in (-2, -1, 0, 1, 2)}
    query = torch.tensor(sorted(spot for spot in spots if 0 <= spot < longest), device=device)[:, None]
    key = torch.arange(longest, device=device)[None]
    first = torch.zeros((), dtype=torch.int64, device=device)
    try:
        seen = torch.as_tensor(mask_function(first, first, query, key)).expand(len(query), longest)
    except (IndexError, RuntimeError, TypeError):  # a rule over the tokens of its own batch
        return None
    causal = key <= query
    if torch.equal(seen, causal):
        return None, None
    if local_size is not None:
        if torch.equal(seen, causal & (key > query - local_size)):
            return local_size, None
        if torch.equal(seen, causal & (key >= query - query % local_size)):
            return None, local_size
    return None


def check_cache(config, layers: dict[int, list[Rule]]) -> None:
    """Raise UnsupportedModel if stock's own cache drops keys that a layer's mask shows.

    Such a model has no tokens of its own: what stock returns depends on how a prompt was cut.
    """
    for index, layer in enumerate(DynamicCache(config=config).layers):
        kept = getattr(layer, "sliding_window", None) if getattr(layer, "is_sliding", False) else None
        for window, chunk in layers.get(index, ()):
            seen = window or chunk
            if kept is not None and (seen is None or seen > kept):
                raise UnsupportedModel(
                    f"model: layer {index} sees {seen or 'all'} positions, but stock's cache keeps the last {kept} "
                    "only (config.sliding_window), so prefill and decode disagree; set it to None"
                )
