"""`encode` as sentence-transformers has it, on the engine: its `SentenceTransformer.encode`, for decoder-only models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy
import torch

from ..base.errors import InvalidArgument, UnsupportedOption
from ..engine.engine import BatchEngine

__all__ = ["SentenceEncoder"]

_SIMILARITIES = {
    "cosine": lambda first, second: _unit(first) @ _unit(second).T,
    "dot": lambda first, second: first @ second.T,
    "euclidean": lambda first, second: -torch.cdist(first, second),
    "manhattan": lambda first, second: -torch.cdist(first, second, p=1),
}


class SentenceEncoder:
    """Vectors of texts. Names, defaults and results are those of sentence-transformers' SentenceTransformer.

    What a checkpoint of sentence-transformers says is taken from the files beside it: pooling, whether vectors are normalized, prompts,
    the maximum length and the similarity.

    Args:
        engine: an Engine with a tokenizer.
        pooling: "mean", "last" or "cls" in place of what the checkpoint says.
        prompts: texts to put before others, by name, beside those of the checkpoint.
        default_prompt_name: the one of `prompts` that is used where none is named.
        max_seq_length: tokens beyond it are cut off; by default what checkpoint, tokenizer and engine allow.
        similarity_fn_name: "cosine", "dot", "euclidean" or "manhattan".
        truncate_dim: what `encode` keeps of vectors unless it is told otherwise.

    Raises InvalidArgument for what is wrong, by name.
    """

    def __init__(
        self,
        engine: BatchEngine,
        *,
        pooling: str | None = None,
        prompts: dict[str, str] | None = None,
        default_prompt_name: str | None = None,
        max_seq_length: int | None = None,
        similarity_fn_name: str | None = None,
        truncate_dim: int | None = None,
    ):
        if engine.tokenizer is None:
            raise InvalidArgument("engine has no tokenizer")
        noted = engine.model.sentences
        most = min(engine.max_model_len, engine.tokenizer.model_max_length)
        if max_seq_length is not None and not 1 <= max_seq_length <= most:
            raise InvalidArgument(f"max_seq_length must be between 1 and {most}, got {max_seq_length}")
        self.engine, self.pooling, self.truncate_dim = engine, pooling, truncate_dim
        self.prompts = {"query": "", "document": ""} | noted.prompts | (prompts or {})
        self.default_prompt_name = noted.default_prompt_name if default_prompt_name is None else default_prompt_name
        self.max_seq_length = max_seq_length or min(most, noted.max_seq_length or most)
        self.similarity_fn_name = similarity_fn_name or noted.similarity
        if self.similarity_fn_name not in _SIMILARITIES:
            known = ", ".join(map(repr, _SIMILARITIES))
            raise InvalidArgument(f"similarity_fn_name must be one of {known}, got {self.similarity_fn_name!r}")
        self._normalizes, self._pools_prompt = noted.normalizes, noted.pools_prompt
        self._prompt(None, None)

    def encode(
        self,
        inputs: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: str = "sentence_embedding",
        precision: str = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
    ) -> numpy.ndarray | torch.Tensor | list[torch.Tensor]:
        """float32 [D] of one text, [N, D] of a list of them.

        Args:
            prompt_name, prompt: the text before each of them: one of `prompts`, or as it is.
            batch_size: has no effect: the engine makes its own batches.
            output_value, precision, device: only their defaults, and the engine's own device.
            convert_to_numpy, convert_to_tensor: an array, a tensor (which goes first), or without both a list of tensors.
            normalize_embeddings: scale to length 1; models that do so anyway, do.
            truncate_dim: keep only so many leading numbers, before that.

        Raises InvalidArgument, UnsupportedOption, and what `Engine.embed` raises.
        """
        self._refuse(output_value, precision, device)
        one = isinstance(inputs, str)
        texts = [inputs] if one else _listed(inputs)
        before = self._prompt(prompt_name, prompt)
        prompts = [self._tokens(before, text) for text in texts]
        outputs = self.engine.embed(prompts, self.pooling, self._normalizes, progress=bool(show_progress_bar))
        vectors = numpy.asarray([output.embedding for output in outputs], dtype=numpy.float32)
        found = self._finished(torch.from_numpy(vectors), truncate_dim, normalize_embeddings)
        if convert_to_tensor:
            return found[0] if one else found
        if convert_to_numpy:
            return found.numpy()[0] if one else found.numpy()
        return found[0] if one else list(found)

    def encode_query(self, inputs: str | Sequence[str], **options):
        """`encode` with the prompt "query", if no other is given."""
        return self.encode(inputs, **self._for("query", options))

    def encode_document(self, inputs: str | Sequence[str], **options):
        """`encode` with the prompt "document", if no other is given."""
        return self.encode(inputs, **self._for("document", options))

    def similarity(self, embeddings1, embeddings2) -> torch.Tensor:
        """[N, M]: how alike the vectors of two lists, arrays or tensors are, by `similarity_fn_name`."""
        first, second = (
            torch.as_tensor(numpy.asarray(vectors)).float().reshape(-1, numpy.shape(vectors)[-1])
            for vectors in (embeddings1, embeddings2)
        )
        return _SIMILARITIES[self.similarity_fn_name](first, second)

    def _refuse(self, output_value: str, precision: str, device: str | None) -> None:
        if output_value != "sentence_embedding":
            raise UnsupportedOption(f"output_value: there are only 'sentence_embedding's, not {output_value!r}")
        if precision not in (None, "float32"):
            raise UnsupportedOption(f"precision: vectors are 'float32', not {precision!r}")
        if device is not None and torch.device(device).type != self.engine.model.device.type:
            raise UnsupportedOption(f"device: the engine's model is on {self.engine.model.device}, not {device}")

    def _finished(self, vectors: torch.Tensor, truncate_dim: int | None, normalize: bool) -> torch.Tensor:
        """Of a full [N, D], what is kept of it."""
        size = self.truncate_dim if truncate_dim is None else truncate_dim
        if size is not None and (not isinstance(size, int) or size < 1):
            raise InvalidArgument(f"truncate_dim must be a positive integer, got {size!r}")
        kept = vectors[..., :size]
        return _unit(kept) if normalize else kept

    def _for(self, name: str, options: dict) -> dict:
        given = options.get("prompt") is not None or options.get("prompt_name") is not None
        return options if given else {**options, "prompt_name": name}

    def _prompt(self, name: str | None, text: str | None) -> str:
        if text is None:
            name = self.default_prompt_name if name is None else name
            if name is not None and name not in self.prompts:
                known = ", ".join(map(repr, self.prompts))
                raise InvalidArgument(f"prompt_name {name!r} is not one of prompts, which are: {known}")
            text = "" if name is None else self.prompts[name]
        if text and not self._pools_prompt and (self.pooling or self.engine.model.pooling) != "last":
            raise UnsupportedOption("prompt: this checkpoint leaves the prompt's tokens out of pooling, which is not known here")
        return text

    def _tokens(self, before: str, text: str) -> list[int]:
        if not isinstance(text, str):
            raise InvalidArgument(f"inputs must be a text or a list of texts, got one that is {text!r}")
        ids = self.engine.tokenizer(before + text, truncation=True, max_length=self.max_seq_length)["input_ids"]
        if not ids:
            raise InvalidArgument(f"inputs: {text!r} has no tokens")
        return ids


def _listed(inputs: Sequence[str]) -> list[str]:
    if not isinstance(inputs, Iterable):
        raise InvalidArgument(f"inputs must be a text or a list of texts, got {inputs!r}")
    return list(inputs)


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)
