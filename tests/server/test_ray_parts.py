"""What the replicas on Ray are chosen by, counted by and built from; no cluster is needed."""

from __future__ import annotations

import asyncio
import warnings
from types import SimpleNamespace

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own, while its modules are imported
    pytest.importorskip("ray.serve")

from hf_paged import InvalidArgument  # noqa: E402
from hf_paged.integrations.openai import Settings  # noqa: E402
from hf_paged.integrations.ray_serve import Options, app, build_app  # noqa: E402
from hf_paged.integrations.ray_serve.exchange import Call, answers  # noqa: E402
from hf_paged.integrations.ray_serve.merged import merged  # noqa: E402
from hf_paged.integrations.ray_serve.prefix import BLOCKS, CHARACTERS, PrefixTable, prefix_keys, ranked  # noqa: E402
from hf_paged.integrations.ray_serve.scaling import by_sequences  # noqa: E402

CHAT = "/v1/chat/completions"
LONG = "a common beginning " * 60


def chat(*said: str, **more) -> tuple[bytes, ...]:
    return prefix_keys(CHAT, {"messages": [{"role": "user", "content": text} for text in said], **more})


def shared(one: tuple, other: tuple) -> int:
    return next((place for place, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def test_keys_stand_for_what_prompts_have_in_common():
    one, other = chat(LONG + "one"), chat(LONG + "other")
    assert shared(one, other) == len(LONG) // CHARACTERS
    assert chat(LONG, "and on")[: len(LONG) // CHARACTERS] == chat(LONG)[: len(LONG) // CHARACTERS]
    written_otherwise = prefix_keys(CHAT, {"messages": [{"content": LONG, "role": "user"}]})
    assert written_otherwise == chat(LONG)
    assert len(prefix_keys("/v1/completions", {"prompt": "x" * 10**6})) == BLOCKS
    assert shared(*(prefix_keys("/v1/completions", {"prompt": list(range(500)) + [end]}) for end in (1, 2))) > 3
    assert prefix_keys("/v1/completions", {"prompt": [LONG, "second"]}) == prefix_keys("/v1/completions", {"prompt": LONG})
    assert prefix_keys("/v1/responses", {"input": LONG}) and prefix_keys("/v1/responses", {"input": [{"content": LONG}]})


@pytest.mark.parametrize("more", [{"cache_salt": "mine"}, {"model": "an adapter"}])
def test_what_shares_no_cache_shares_no_key(more):
    assert not set(chat(LONG)) & set(chat(LONG, **more))


@pytest.mark.parametrize(
    "body", [None, [], 3, {}, {"prompt": 3}, {"prompt": {}}, {"prompt": []}, {"prompt": [[]]}, {"prompt": [None]}, {"prompt": "\ud800"}]
)
def test_bodies_that_nobody_takes_are_no_trouble(body):
    for path in ("/v1/completions", CHAT, "/v1/responses", "/v1/embeddings"):
        assert isinstance(prefix_keys(path, body), tuple)


def test_the_replica_that_knows_most_is_first_unless_it_has_too_much_to_do():
    table, one, other = PrefixTable(1000), chat(LONG + "one" * 200), chat(LONG + "other" * 200)
    table.add(one, "a")
    table.add(other, "b")
    assert ranked({"a": 3, "b": 0, "c": 0}, one, table, slack=3)[0] == "a"
    assert ranked({"a": 4, "b": 0, "c": 1}, one, table, slack=3) == ["b", "c", "a"]
    assert ranked({"a": 1, "b": 0, "c": 0}, chat(LONG + "third"), table, slack=3)[0] == "b"  # both have seen as much
    unknown = chat("nothing like it" * 30)
    assert ranked({"a": 1, "b": 1, "c": 0}, unknown, table, slack=3)[0] == "c"
    tied = ranked({"a": 0, "b": 0, "c": 0}, unknown, table, slack=3)
    assert tied == ranked({"c": 0, "b": 0, "a": 0}, unknown, PrefixTable(10), slack=3)  # another front would choose so, too


def test_the_table_is_bounded_and_forgets_replicas():
    table = PrefixTable(10)
    for number in range(50):
        table.add(chat(f"{number} " + LONG), "a")
    assert len(table) == 10
    last = chat("49 " + LONG)
    assert table.longest(last, ["a", "b"]) == {"a"}
    table.add(last[:1], "b")
    table.keep(["b"])
    assert table.longest(last, ["a", "b"]) == {"b"} and len(table) == 1


def test_sequences_decide_how_many_replicas():
    config = SimpleNamespace(get_target_ongoing_requests=lambda: 8)
    context = SimpleNamespace(aggregated_metrics={"sequences": {"a": 20.0, "b": 2.0}}, total_queued_requests=10, config=config)
    assert by_sequences(context)[0] == 4
    assert by_sequences(SimpleNamespace(aggregated_metrics=None, total_queued_requests=0, config=config))[0] == 0


def test_numbers_of_all_replicas_are_one_page():
    page = "# HELP hf_paged:x_total Things.\n# TYPE hf_paged:x_total counter\nhf_paged:x_total{code=\"%s\"} %d.0\n"
    text = merged({"b": page % ("late", 2), "a": page % ("late", 1)}).decode()
    assert text.count("# TYPE") == 1
    assert 'hf_paged:x_total{code="late",replica="a"} 1.0' in text and 'hf_paged:x_total{code="late",replica="b"} 2.0' in text


def test_options_are_checked_where_the_application_is_built():
    for wrong in (
        {"engine": {"max_num_seqs": 0}},
        {"server": {"model_name": "x", "nonsense": 1}},
        {"server": {"enable_adapters": True}},
        {"num_replicas": 2, "autoscaling": {"max_replicas": 3}},
        {"tensor_parallel_size": 0},
        {"gpus": 1},
    ):
        with pytest.raises((ValueError, TypeError)):
            build_app("model", **wrong)
    with pytest.raises(InvalidArgument, match="user_config"):
        build_app("model", server={"enable_adapters": True})
    assert app(Options.model_validate({"model": "x", "num_replicas": "2", "num_gpus": "0.5"}))  # as `serve run` gives them


def test_ids_of_responses_begin_with_the_servers_tag():
    with pytest.raises(InvalidArgument, match="response_tag"):
        Settings(response_tag="a-b")


def test_an_app_hears_of_a_reader_that_stops():
    seen = []

    async def slow(scope, receive, send):
        seen.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(1000):
            await send({"type": "http.response.body", "body": b"%d" % number, "more_body": True})
            if number == 2:
                seen.append((await receive())["type"])
                return

    async def main():
        got = []
        parts = answers(slow, Call({"type": "http"}, b"asked"))
        async for messages in parts:
            got += messages
            if len(got) >= 4:
                break
        await parts.aclose()
        return got

    got = asyncio.run(main())
    assert [message.get("body") for message in got] == [None, b"0", b"1", b"2"]
    assert seen == [b"asked", "http.disconnect"]


def test_an_app_that_fails_fails_for_its_reader():
    async def broken(scope, receive, send):
        raise KeyError("broken")

    async def main():
        async for _ in answers(broken, Call({"type": "http"}, b"")):
            pass

    with pytest.raises(KeyError):
        asyncio.run(main())


def test_a_config_file_sets_limits_on_images_and_a_disk(tmp_path):
    engine = {"images": {"max_count": 2, "max_pixels": 9}, "offload": {"memory": "1MiB", "disk": str(tmp_path)}}
    config = Options(engine=engine, server={"allowed_media_hosts": ["example.org"]}).engine_config()
    assert (config.images.max_count, config.images.max_total_pixels) == (2, 36)
    assert config.offload.memory == 2**20 and config.offload.disk == str(tmp_path)
    assert Options(server={"allowed_media_hosts": ["example.org"]}).settings().allowed_media_hosts == ("example.org",)
