"""`encode` as sentence-transformers has it, on the engine: its `SentenceTransformer.encode`, for decoder-only models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch

from ..base.errors import InvalidArgument
from ..engine.engine import BatchEngine

__all__ = ["SentenceEncoder"]


class SentenceEncoder:
    """Vectors of texts. Names, defaults and results are those of sentence-transformers' SentenceTransformer.

    Args:
        engine: an Engine with a tokenizer.
        pooling: "mean", "last" or "cls"; default what the checkpoint says, see EmbedParams.
        prompts: texts to put before others, by name.
        default_prompt_name: the one of `prompts` that is used where none is named.
        max_seq_length: tokens beyond it are cut off; default what tokenizer and engine allow.

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
    ):
        if engine.tokenizer is None:
            raise InvalidArgument("engine has no tokenizer")
        most = min(engine.max_model_len, engine.tokenizer.model_max_length)
        if max_seq_length is not None and not 1 <= max_seq_length <= most:
            raise InvalidArgument(f"max_seq_length must be between 1 and {most}, got {max_seq_length}")
        self.engine, self.pooling = engine, pooling
        self.prompts = dict(prompts or {})
        self.default_prompt_name = default_prompt_name
        self.max_seq_length = max_seq_length or most
        self._prompt(default_prompt_name, None)

    def encode(
        self,
        sentences: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
    ) -> numpy.ndarray | torch.Tensor | list[torch.Tensor]:
        """float32 [D] of one text, [N, D] of a list of them.

        Args:
            prompt_name, prompt: the text before each of them: one of `prompts`, or as it is.
            batch_size: has no effect: the engine makes its own batches.
            convert_to_numpy, convert_to_tensor: an array, a tensor (which goes first), or without both a list of tensors.
            normalize_embeddings: scale to length 1.
            truncate_dim: keep only so many leading numbers, before that.

        Raises InvalidArgument, and what `Engine.embed` raises.
        """
        one = isinstance(sentences, str)
        texts = [sentences] if one else list(sentences)
        before = self._prompt(prompt_name, prompt)
        outputs = self.engine.embed(
            [self._tokens(before, text) for text in texts],
            self.pooling,
            normalize_embeddings,
            truncate_dim,
            progress=bool(show_progress_bar),
        )
        vectors = [output.embedding for output in outputs]
        if convert_to_tensor or not convert_to_numpy:
            vectors = [torch.from_numpy(vector) for vector in vectors]
        if one:
            return vectors[0]
        if convert_to_tensor:
            return torch.stack(vectors) if vectors else torch.empty(0)
        return numpy.asarray(vectors, dtype=numpy.float32) if convert_to_numpy else vectors

    def encode_query(self, sentences: str | Sequence[str], **options):
        """`encode` with the prompt "query", if there is one and no other is given."""
        return self.encode(sentences, **self._for(("query",), options))

    def encode_document(self, sentences: str | Sequence[str], **options):
        """`encode` with the prompt "document", "passage" or "corpus", the first there is, if no other is given."""
        return self.encode(sentences, **self._for(("document", "passage", "corpus"), options))

    @staticmethod
    def similarity(first, second) -> torch.Tensor:
        """[N, M] cosines of the angles between the vectors of two lists, arrays or tensors."""
        first, second = (
            torch.nn.functional.normalize(
                torch.as_tensor(numpy.asarray(vectors)).float().reshape(-1, numpy.shape(vectors)[-1])
            )
            for vectors in (first, second)
        )
        return first @ second.T

    def _for(self, names: tuple[str, ...], options: dict) -> dict:
        known = next((name for name in names if name in self.prompts), None)
        if known is None or options.get("prompt") is not None or options.get("prompt_name") is not None:
            return options
        return {**options, "prompt_name": known}

    def _prompt(self, name: str | None, text: str | None) -> str:
        if text is not None:
            return text
        name = self.default_prompt_name if name is None else name
        if name is None:
            return ""
        if name not in self.prompts:
            known = ", ".join(map(repr, self.prompts)) or "none"
            raise InvalidArgument(f"prompt_name {name!r} is not one of prompts, which are: {known}")
        return self.prompts[name]

    def _tokens(self, before: str, text: str) -> list[int]:
        if not isinstance(text, str):
            raise InvalidArgument(f"sentences must be a text or a list of texts, got {type(text).__name__}")
        return self.engine.tokenizer((before + text).strip(), truncation=True, max_length=self.max_seq_length)[
            "input_ids"
        ]
