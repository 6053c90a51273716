"""The layers that adapters change, and the rows of a forward by adapter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_paged_kernels import fused
from hf_paged_kernels.lora import RowTiles, Site, Terms, add_terms_, num_tiles, rows_on_device, tile_numbers, tile_rows

from ...runtime.transfer import to_device
from ..fusion.merged import Merged, MergedLinear
from .loading import innermost
from .targets import Target


@dataclass(eq=False)
class LayerSite:
    """A layer, or layers that are computed as one, with what each adapter makes of it.

    Attributes:
        terms: what kernels add.
        saved: slot -> (which of the layers, what takes its place).
        sees_logit_rows: whether the layer is called with the rows whose logits are wanted alone.
    """

    terms: Site
    saved: dict[int, list[tuple[int, nn.Module]]] = field(default_factory=dict)
    sees_logit_rows: bool = False

    def changed(self, x: Tensor, y: Tensor, tiles: RowTiles, backend: str) -> Tensor:
        y = y if y.is_contiguous() else y.contiguous()
        add_terms_(y, x, tiles, self.terms, backend=backend)
        if tiles.rows is None:  # nobody in the batch has what takes a layer's place
            return y
        for slot, layers in self.saved.items():
            rows = tiles.rows.get(slot)
            if rows is not None:
                for index, layer in layers:
                    self._replace(x, y, rows, index, layer, backend)
        return y

    def _replace(self, x: Tensor, y: Tensor, rows: Tensor, index: int, layer: nn.Module, backend: str) -> None:
        sizes = self.terms.sizes
        columns = y.view(-1, y.shape[-1])[:, sum(sizes[:index]) : sum(sizes[: index + 1])]
        if isinstance(layer, nn.Embedding):
            columns[rows] = F.embedding(x.reshape(-1)[rows], layer.weight).to(y.dtype)
        else:
            own = x.reshape(-1, x.shape[-1])[rows].to(layer.weight.dtype)
            columns[rows] = fused.linear(own, layer.weight, layer.bias, backend=backend).to(y.dtype)


class Sites:
    """The sites of one model, by the layer (or Merged) they are for.

    Args:
        dtype: of the terms.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device):
        self._model, self._dtype, self._device = model, dtype, device
        self._sites: dict[int, LayerSite] = {}
        self._owners: dict[int, object] = {}  # whose id the key is, lest another object gets it
        self.called: set[int] | None = None  # ids of the layers that asked, while somebody notes them
        self.by_host: set[int] = set()  # and of those where the host must know which rows are whose
        self.generation = 0  # counts changes after which the tables or the layers that ask are others

    def __iter__(self):
        return iter(self._sites.values())

    def note(self, layer: object, x: Tensor, y: Tensor, backend: str) -> None:
        """A layer asks."""
        self.called.add(id(layer))
        if self.of(layer).saved or not rows_on_device(y, x, self.of(layer).terms, backend):
            self.by_host.add(id(layer))

    def was_called(self, layer: nn.Module) -> bool:
        """Whether a layer, or what it is computed as a part of, asked while it was noted."""
        return not self.called.isdisjoint(_asks_as(layer))

    def needs_host(self, layer: nn.Module) -> bool:
        """Whether it asked in a way that a recorded forward cannot: the host must know whose rows there are."""
        return not self.by_host.isdisjoint(_asks_as(layer))

    def of(self, layer: object) -> LayerSite | None:
        return self._sites.get(id(layer))

    def put(self, slot: int, targets: Iterable[Target]) -> list[Terms]:
        """Let the adapter of `slot` change its targets. Returns the tensors it takes."""
        self.generation += 1
        taken: list[Terms] = []
        joint: dict[int, tuple[Merged, dict[int, Terms]]] = {}
        for target in targets:
            state = getattr(target.layer, "_hf_paged", None)
            merged, index = state if isinstance(target.layer, MergedLinear) else (None, 0)
            site = self._site(target.layer, [target.sizes[1]], target.looks_up)
            if target.saved is not None:
                site.saved[slot] = [(0, target.saved)]
                if merged is not None:
                    self._site(merged, merged.sizes).saved.setdefault(slot, []).append((index, target.saved))
                continue
            terms = target.terms(self._dtype, self._device)
            taken.append(terms)
            site.terms.put(slot, (terms,))
            if merged is not None:
                joint.setdefault(id(merged), (merged, {}))[1][index] = terms
        for merged, terms in joint.values():
            parts = tuple(terms.get(index) for index in range(len(merged.sizes)))
            self._site(merged, merged.sizes).terms.put(slot, parts)
        return taken

    def remove(self, slot: int) -> None:
        self.generation += 1
        for key, site in list(self._sites.items()):
            site.terms.remove(slot)
            site.saved.pop(slot, None)
            if not site.terms.terms and not site.saved:
                del self._sites[key], self._owners[key]

    def _head(self) -> nn.Module | None:
        """The layer that gives logits, of next tokens or of labels."""
        head = self._model.get_output_embeddings() or getattr(self._model, "score", None)
        return None if head is None else innermost(head)

    def _site(self, layer: object, sizes: list[int], looks_up: bool = False) -> LayerSite:
        site = self._sites.get(id(layer))
        if site is None:
            site = LayerSite(
                Site(sizes, self._device, self._dtype, looks_up=looks_up),
                sees_logit_rows=layer is self._head(),
            )
            self._sites[id(layer)], self._owners[id(layer)] = site, layer
        return site


def _asks_as(layer: nn.Module) -> set[int]:
    """Ids that a layer may ask under: its own, or that of what it is computed as a part of."""
    return {id(layer), id(layer._hf_paged[0])} if isinstance(layer, MergedLinear) else {id(layer)}


class ForwardRows:
    """Implements `runtime.adapters.StepAdapters`: the rows of one forward.

    Args:
        slots: [T] the slot of every row's adapter; below 0 for none.
    """

    def __init__(self, sites: Sites, slots: np.ndarray, device: torch.device, backend: str):
        self._sites, self._slots, self._device, self._backend = sites, slots, device, backend
        self._all = tile_rows(slots, device)
        self._logit_rows: Tensor | None = None
        self._of_logits: RowTiles | None = None  # made when somebody asks: mostly no adapter changes that layer

    def take_logit_rows(self, rows: Tensor | None) -> None:
        """The packed rows [R] that the output embedding is called with; None: all."""
        self._logit_rows, self._of_logits = rows, None

    def changed(self, layer: object, x: Tensor, y: Tensor) -> Tensor:
        site = self._sites.of(layer)
        if site is None:
            return y
        if self._sites.called is not None:
            self._sites.note(layer, x, y, self._backend)
        tiles = self._tiles_of_logits() if site.sees_logit_rows else self._all
        return site.changed(x, y, tiles, self._backend)

    def _tiles_of_logits(self) -> RowTiles:
        if self._logit_rows is None:
            return self._all
        if self._of_logits is None:
            self._of_logits = tile_rows(self._slots[self._logit_rows.cpu().numpy()], self._device)
        return self._of_logits


class RecordedRows:
    """Implements `runtime.adapters.StepAdapters` for recorded forwards: numbers in buffers that do not move.

    One after another it is the rows of many steps of `size` sequences with one token each; `fill` says which.

    Args:
        num_adapters: how many there may be among the rows.
    """

    def __init__(self, sites: Sites, size: int, num_adapters: int, device: torch.device, backend: str):
        self._sites, self._backend = sites, backend
        count = num_tiles(size, num_adapters)
        self._buffer = torch.zeros(2, size + 3 * count, dtype=torch.int32, device=device)
        self._all, self._of_logits = (
            RowTiles(size, numbers[:size], numbers[size:].view(count, 3), None) for numbers in self._buffer
        )
        self._size = size
        self._logits_apart = True

    def fill(self, slots: np.ndarray, rows: Sequence[int]) -> None:
        """The rows of a step.

        Args:
            slots: of the sequences' adapters, at most `size`; below 0 for none.
            rows: the sequences whose logits are wanted.
        """
        numbers = np.zeros(self._buffer.shape, dtype=np.int32)
        for target, own in zip(numbers, (slots, slots[np.asarray(rows, dtype=np.int64)])):
            order, tiles, _ = tile_numbers(own)
            target[: len(order)] = order
            target[self._size : self._size + tiles.size] = tiles.reshape(-1)
        self._buffer.copy_(to_device(numbers, torch.int32, self._buffer.device))

    def take_logit_rows(self, rows: Tensor | None) -> None:
        """Which they are, `fill` was told: no host takes part in a replay."""
        self._logits_apart = rows is not None

    def changed(self, layer: object, x: Tensor, y: Tensor) -> Tensor:
        site = self._sites.of(layer)
        if site is None or not rows_on_device(y, x, site.terms, self._backend):  # only others have something there
            return y
        tiles = self._of_logits if site.sees_logit_rows and self._logits_apart else self._all
        return site.changed(x, y, tiles, self._backend)
