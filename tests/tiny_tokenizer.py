"""A byte-level tokenizer of any size, made on the spot: characters of several bytes span several tokens."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def tiny_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Ids 0 to 2 are pad, bos and eos, then the 256 bytes, then pairs of letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in "etaoinshr" for b in "etaoinshr"][: max(0, vocab_size - 259)]
    words = ["<pad>", "<s>", "</s>", *alphabet, *(a + b for a, b in pairs)]
    assert len(words) == vocab_size, "choose a vocabulary between 259 and 340"
    backend = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
