"""Detokenizing token by token equals decoding at once; stop strings are found however the text is cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from hf_paged.base.errors import InvalidArgument
from hf_paged.engine import text as text_module
from hf_paged.engine.text import IncrementalDetokenizer, StopStringMatcher, encode_bad_words

SAMPLE = "The naïve café — 東京 👩‍👩‍👧 costs 5€, ﷽ and \ufffd too.\n\n  Ende"


def _byte_level() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("Ã", "©"), ("e", "Ã"), ("æ", "Ŀ"), ("Ġ", "Ġ"), ("ð", "Ł")]
    words = [*alphabet, *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", clean_up_tokenization_spaces=False
    )
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return tokenizer


def _metaspace() -> PreTrainedTokenizerFast:
    """As Llama 2: words begin with the space mark, unknown characters are bytes, a leading space is stripped."""
    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b"]
    merges = [("▁", "a"), ("▁", "b")]
    model = models.BPE({word: index for index, word in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", clean_up_tokenization_spaces=False)


BYTE_LEVEL, METASPACE, SLOW = _byte_level(), _metaspace(), ByT5Tokenizer(extra_ids=0)
MARKED = _byte_level()
MARKED.add_special_tokens({"additional_special_tokens": ["[MARK]"]})
IDS = st.lists(st.integers(0, len(BYTE_LEVEL) - 1), max_size=40)
HIGH = [
    BYTE_LEVEL.convert_tokens_to_ids(piece) for piece in ("Ã", "©", "æ", "Ŀ", "ð", "Ł", "eÃ", "ï", "¿", "½", "<|end|>")
]


def stream(tokenizer, prompt, output, **options):
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, **options)
    pieces = [detokenizer.append(token) for token in output]
    pieces.append(detokenizer.flush())
    assert detokenizer.text == "".join(pieces)
    return pieces


@settings(max_examples=300, deadline=None)
@given(output=IDS | st.lists(st.sampled_from(HIGH), max_size=60), prompt_text=st.text(max_size=8), skip=st.booleans())
def test_byte_level_stream_equals_decode(output, prompt_text, skip):
    prompt = BYTE_LEVEL.encode(prompt_text)
    pieces = stream(BYTE_LEVEL, prompt, output, skip_special_tokens=skip)
    assert "".join(pieces) == BYTE_LEVEL.decode(output, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(output=IDS | st.lists(st.sampled_from(HIGH), max_size=60))
def test_kept_special_tokens_show_and_others_do_not(output):
    mark, end = MARKED.convert_tokens_to_ids(["[MARK]", "<|end|>"])
    output = [mark if token % 7 == 3 else token for token in output]
    pieces = stream(MARKED, MARKED.encode("Prompt"), output, keep_special_token_ids=(mark,))
    assert "".join(pieces) == MARKED.decode([token for token in output if token != end])


@settings(max_examples=300, deadline=None)
@given(output=st.lists(st.integers(0, 258) | st.integers(0xC0, 0xFF), max_size=40), skip=st.booleans())
def test_slow_tokenizer_stream_equals_decode(output, skip):
    pieces = stream(SLOW, SLOW.encode("Prompt", add_special_tokens=False), output, skip_special_tokens=skip)
    assert "".join(pieces) == SLOW.decode(output, skip_special_tokens=skip)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SLOW], ids=["fast", "slow"])
def test_text_comes_as_early_as_it_can(tokenizer):
    output = tokenizer.encode(SAMPLE.replace("\ufffd", ""), add_special_tokens=False)
    pieces = stream(tokenizer, [], output)
    assert "".join(pieces) == SAMPLE.replace("\ufffd", "") and pieces[-1] == ""
    assert not any("\ufffd" in piece for piece in pieces)
    assert max(map(len, pieces)) <= 4 and "" in pieces  # characters of several tokens come when whole


def test_real_replacement_character_comes_through():
    assert "".join(stream(BYTE_LEVEL, [], BYTE_LEVEL.encode(SAMPLE))) == SAMPLE


def test_incomplete_character_is_held_until_flush():
    ids = BYTE_LEVEL.encode("a東")
    pieces = stream(BYTE_LEVEL, [], ids[:-1])
    assert pieces[0] == "a" and set(pieces[1:-1]) <= {""} and pieces[-1] == "\ufffd"


def test_prompt_that_ends_within_a_character():
    ids = BYTE_LEVEL.encode("x東y")
    cut = len(ids) - 2
    assert "".join(stream(BYTE_LEVEL, ids[:cut], ids[cut:])) == "東y"


def test_space_after_the_prompt_is_kept():
    a, b = METASPACE.convert_tokens_to_ids(["▁a", "▁b"])
    assert METASPACE.decode([b]) == "b"
    assert stream(METASPACE, [a], [b, a]) == [" b", " a", ""]
    assert stream(METASPACE, [], [b, a]) == ["b", " a", ""]
    end = METASPACE.eos_token_id  # special tokens are no context
    assert stream(METASPACE, [a, *[end] * 9], [b, end, a]) == [" b", "", " a", ""]
    assert "".join(stream(METASPACE, [a], [b, *[end] * 40, a])) == " b a"


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="ab é東👩", max_size=20))
def test_byte_fallback_stream_equals_decode(text):
    prompt = METASPACE.encode("a")
    output = METASPACE.encode("a" + text)[1:]
    decoded = METASPACE.decode(prompt + output)
    assert METASPACE.decode(prompt) + "".join(stream(METASPACE, prompt, output)) == decoded


@pytest.mark.parametrize("name", ["eos", "invalid"])
def test_cost_per_token_is_bounded(name):
    """Neither endless special tokens nor endless invalid bytes make the window grow."""
    longest = 0

    class Watched:
        is_fast = True
        added_tokens_decoder = BYTE_LEVEL.added_tokens_decoder

        def decode(self, ids, **options):
            nonlocal longest
            longest = max(longest, len(ids))
            return BYTE_LEVEL.decode(ids, **options)

    token = BYTE_LEVEL.eos_token_id if name == "eos" else BYTE_LEVEL.convert_tokens_to_ids("æ")
    pieces = stream(Watched(), BYTE_LEVEL.encode("prompt " * 50), [token] * 300)
    assert longest <= 40
    assert "".join(pieces) == BYTE_LEVEL.decode([token] * 300, skip_special_tokens=True)


def _reference(text, stops, include):
    """The first match to end wins, then the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.lists(st.text(alphabet="abc", max_size=4), max_size=12),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=4),
    include=st.booleans(),
)
def test_stop_strings_against_a_plain_search(pieces, stops, include):
    expected, expected_stop = _reference("".join(pieces), stops, include)
    matcher, shown, stop = StopStringMatcher(tuple(stops), include), "", None
    for piece in pieces:
        safe, stop = matcher.feed(piece)
        assert safe.startswith(shown) and expected.startswith(safe)  # nothing shown is ever taken back
        shown = safe
        if stop is not None:
            break
    assert stop == expected_stop
    assert matcher.flush() == expected


def test_only_a_possible_beginning_is_held_back():
    matcher = StopStringMatcher(("</end>",), False)
    assert matcher.feed("Hi <b") == ("Hi <b", None)
    assert matcher.feed(" </e") == ("Hi <b ", None)
    assert matcher.feed("x") == ("Hi <b </ex", None)
    assert matcher.feed("</end> more") == ("Hi <b </ex", "</end>")
    assert matcher.feed("ignored") == ("Hi <b </ex", "</end>")


def test_unsearched_text_passes():
    matcher = StopStringMatcher(("stop",), True)
    assert matcher.feed("a stop ", search=False) == ("a stop ", None)
    assert matcher.feed("st", search=False) == ("a stop st", None)
    assert matcher.feed("op then stop.") == ("a stop stop then stop", "stop")


def test_every_character_is_looked_at_once(monkeypatch):
    matcher, steps = StopStringMatcher(tuple("a" * length + "b" for length in range(1, 60)), False), []
    advance = text_module._advance
    monkeypatch.setattr(text_module, "_advance", lambda *state: steps.append(state) or advance(*state))
    for _ in range(500):
        matcher.feed("aaaa")
    assert len(steps) == 2000


def test_bad_words_with_and_without_space():
    found = encode_bad_words(BYTE_LEVEL, [" the"])
    assert BYTE_LEVEL.encode("the") in found and BYTE_LEVEL.encode(" the") in found and len(found) == 2
    assert encode_bad_words(BYTE_LEVEL, ["the", "the"]) == found
    assert encode_bad_words(BYTE_LEVEL, ["\n"])[0] == BYTE_LEVEL.encode("\n")
    empty = type("Empty", (), {"encode": lambda self, text, add_special_tokens: []})()
    with pytest.raises(InvalidArgument, match="^bad_words"):
        encode_bad_words(empty, ["x"])
