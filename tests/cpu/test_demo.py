"""`hf-paged demo` on a model of one's own, from its chats to its comparison with stock."""

from __future__ import annotations

from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

from hf_paged.cli.demo import run_demo


def test_the_demo_chats_compares_and_finds_the_same_tokens(tmp_path, capsys):
    model, tokenizer = tiny_model("llama", vocab_size=320, max_position_embeddings=4096), tiny_tokenizer(320)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert run_demo(str(tmp_path), 3, "cpu", None)
    printed = capsys.readouterr().out
    assert "3 mixed requests" in printed and "KV peak" in printed
