"""Judges: a real client against a server that misbehaves, the cache, and what is read from replies."""

import json
import time

import pytest

from bt_adapter_hf.evaluation.judge import (
    EndpointJudge,
    JudgeError,
    JudgeRefusedError,
    LocalJudge,
    find_object,
    judge_all,
    prompt_key,
    read_score,
    read_yes_no,
)
from tests.evaluation.judge_server import JudgeServer


def ask(text):
    return [{"role": "system", "content": "Rate."}, {"role": "user", "content": text}]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")


def verdicts(judge, texts, cache, **options):
    return list(judge_all(judge, [ask(text) for text in texts], read_score, cache, **options))


def test_good_replies_are_kept_and_not_asked_again(tmp_path):
    with JudgeServer(lambda text, times: f'Sure! {{"score": {len(text)}}} because.').running() as server:
        judge = EndpointJudge("m", server.url)
        first = verdicts(judge, ["a", "bb", "a"], tmp_path / "replies.jsonl")
        again = verdicts(judge, ["bb", "ccc", "a"], tmp_path / "replies.jsonl")
    assert [verdict.fields["score"] for verdict in first] == [1, 2, 1]
    assert [verdict.fields["score"] for verdict in again] == [2, 3, 1]
    assert sorted(server.asked) == ["a", "bb", "ccc"]
    records = [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
    assert {record["raw"] for record in records} == {f'Sure! {{"score": {n}}} because.' for n in (1, 2, 3)}
    assert judge.name == "m at 127.0.0.1" and records[0]["judge"] == judge.name
    assert prompt_key("m", ask("a")) != prompt_key("n", ask("a")) != prompt_key("n", ask("b"))


def test_what_a_bad_server_does(tmp_path):
    """Each prompt gets its own misbehaviour; nobody else's score suffers, and nothing is scored 0."""

    def script(text, times):
        if text == "hangs":
            return 200, b"{}", 2.0
        if text == "too long":
            return 400, b'{"error": {"message": "context"}}', 0
        if text == "never readable":
            return "I would rather not say."
        if text == "out of bounds":
            return '{"score": 48}'
        if text == "no json":
            return 200, b"<html>gateway</html>", 0
        if times == 1 and text in ("429", "500", "prose"):
            return {"429": (429, b"{}", 0), "500": (500, b"oops", 0), "prose": "well..."}[text]
        return "{'score': 4.5}"

    texts = ["429", "500", "prose", "hangs", "too long", "never readable", "out of bounds", "no json", "good"]
    with JudgeServer(script).running() as server:
        judge = EndpointJudge("m", server.url, timeout=1.0, retries=1)
        found = dict(zip(texts, verdicts(judge, texts, tmp_path / "replies.jsonl"), strict=True))
    assert {text for text in texts if found[text].fields} == {"429", "500", "prose", "good"}
    assert all(found[text].fields == {"score": 4.5} for text in ("429", "500", "prose", "good"))
    for text, words in {
        "hangs": "timed out",
        "too long": "context",
        "never readable": "rather not say",
        "out of bounds": "not within 0 to 5",
        "no json": "",
    }.items():
        assert found[text].fields is None and words in found[text].error, found[text]
    assert server.asked.count("never readable") == 3 and server.asked.count("too long") == 1


REFUSALS = {  # status, body of an error, and what is to be done
    "a wrong key": (401, b'{"error": {"message": "no such key"}}', "set OPENAI_API_KEY to a key that http"),
    "a key for other models": (403, b'{"error": {"message": "not yours"}}', "set OPENAI_API_KEY to a key that http"),
    "no such model": (404, b'{"error": {"message": "m?"}}', "it knows no m, or base_url=http"),
    "no money": (429, b'{"error": {"message": "pay", "code": "insufficient_quota"}}', "fill it up"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_that_holds_for_all_prompts_ends_the_run(name, tmp_path, caplog):
    """With one error that says what to do; replies that came are kept, and the next run asks for the rest alone."""
    status, body, advice = REFUSALS[name]
    texts, refusing = [f"text {n}" for n in range(40)], True

    def script(text, times):
        return (status, body, 0.02) if refusing and text not in texts[:3] else '{"score": 3}'

    cache = tmp_path / "replies.jsonl"
    with JudgeServer(script).running() as server:
        judge = EndpointJudge("m", server.url, retries=0, threads=2)
        with pytest.raises(JudgeRefusedError) as error:
            verdicts(judge, texts, cache)
        said = str(error.value)
        assert advice in said and json.loads(body)["error"]["message"] in said and not caplog.messages
        assert len(server.asked) < 10, server.asked
        kept = {json.loads(line)["key"] for line in cache.read_text().splitlines()}
        assert {prompt_key(judge.name, ask(text)) for text in texts[:3]} >= kept and kept
        refusing, before = False, len(kept)
        server.asked.clear()
        assert all(verdict.fields == {"score": 3} for verdict in verdicts(judge, texts, cache))
    assert len(server.asked) == 40 - before


def test_a_judge_that_says_nothing_is_given_up(tmp_path, caplog):
    """Prompts in a row without an answer end the run, named once each; a few among others do not."""
    with JudgeServer(lambda text, times: (200, b"{}", 0.4)).running() as server:
        judge = EndpointJudge("m", server.url, timeout=0.1, retries=0, threads=4)
        with pytest.raises(JudgeRefusedError, match=r"none of 8 prompts in a row.*timeout=0.1 s, once"):
            verdicts(judge, [f"text {n}" for n in range(100)], tmp_path / "replies.jsonl")
        assert 8 <= len(server.asked) <= 12 and len(caplog.messages) == 1
    with JudgeServer(lambda text, times: "I like it.").running() as server:
        with pytest.raises(JudgeRefusedError, match="none of 30 prompts in a row.*I like it"):
            verdicts(EndpointJudge("m", server.url), [f"text {n}" for n in range(100)], tmp_path / "replies.jsonl")
    with pytest.raises(JudgeRefusedError, match=r"Nothing answers at base_url=http://127.0.0.1:9/v1/"):
        judge = EndpointJudge("m", "http://127.0.0.1:9/v1", retries=0)
        verdicts(judge, [f"text {n}" for n in range(100)], tmp_path / "replies.jsonl")


def test_what_a_model_does_not_take_is_left_out(tmp_path, caplog):
    """Models that reason take no temperature and call the length otherwise, and say so with a status 400."""

    def script(text, times):
        unwanted = next((name for name in ("max_tokens", "temperature") if name in server.bodies[-1]), None)
        if unwanted is None:
            return '{"score": 2}'
        return 400, json.dumps({"error": {"message": f"no {unwanted}", "param": unwanted}}).encode(), 0

    with JudgeServer(script).running() as server:
        judge = EndpointJudge("m", server.url, threads=1)
        assert all(found.fields == {"score": 2} for found in verdicts(judge, ["a", "b"], tmp_path / "replies.jsonl"))
    assert server.asked == ["a", "a", "a", "b"] and len(caplog.messages) == 2
    assert "is asked without temperature" in caplog.text and server.bodies[-1]["seed"] == 0


def test_an_interrupted_run_does_not_ask_for_the_rest(tmp_path):
    class Judge:
        name, threads, asked = "m", 1, 0

        def __call__(self, messages):
            self.asked += 1
            if self.asked == 2:
                raise KeyboardInterrupt
            time.sleep(0.05 if self.asked > 2 else 0)
            return '{"score": 1}'

    judge = Judge()
    with pytest.raises(KeyboardInterrupt):
        verdicts(judge, [f"text {n}" for n in range(200)], tmp_path / "replies.jsonl")
    assert judge.asked < 200


DEEP = 20_000
SHAPES = {  # bodies of answers with status 200, whole JSON in another shape than the protocol's
    "a list": b"[]",
    "a number": b"3",
    "a string": b'"fine"',
    "null": b"null",
    "no choices": b'{"choices": []}',
    "choices are a number": b'{"choices": 5}',
    "a choice is a number": b'{"choices": [5]}',
    "content is a list": b'{"choices": [{"message": {"content": [1]}}]}',
    "content is an object": b'{"choices": [{"message": {"content": {"score": 3}}}]}',
    "content is blank": b'{"choices": [{"message": {"content": " "}}]}',
    "body without end": b'{"choices": ' + b"[" * DEEP + b"]" * DEEP + b"}",
}
TEXTS = {  # whole answers whose text is no score
    "text is a list": "[1, 2]",
    "text is a number": "4",
    "text is a string": '"4"',
    "NaN": '{"score": NaN}',
    "infinite": '{"score": 1e999}',
    "400 digits": '{"score": 1' + "0" * 400 + "}",
    "5000 digits": '{"score": 1' + "0" * 5000 + "}",
    "a score in a list": '{"score": [3]}',
    "objects without end": '{"score": ' * DEEP + "3" + "}" * DEEP,
    "brackets without end": '{"score": ' + "[" * DEEP,
    "braces without end": "{" * DEEP + "}" * DEEP,
    "a set of lists": "{[]: 1}",
}


def test_json_of_another_shape_is_a_failure_of_its_prompt_alone(tmp_path):
    """Asked for again, and counted with its reason when it does not get better."""

    def script(text, times):
        if text == "better at last" and times < 3:
            return 200, b"[]", 0
        return (200, SHAPES[text], 0) if text in SHAPES else TEXTS.get(text, '{"score": 4}')

    texts = [*SHAPES, *TEXTS, "better at last", "good"]
    with JudgeServer(script).running() as server:
        judge = EndpointJudge("m", server.url, retries=0)
        found = dict(zip(texts, verdicts(judge, texts, tmp_path / "replies.jsonl"), strict=True))
    assert {text for text in texts if found[text].fields} == {"better at last", "good"}
    assert all(server.asked.count(text) == 3 for text in (*SHAPES, *TEXTS)), server.asked
    assert all(found[text].error and len(found[text].error) < 400 for text in (*SHAPES, *TEXTS))


def test_damaged_lines_of_the_cache_are_named_and_asked_again(tmp_path, caplog):
    cache = tmp_path / "replies.jsonl"
    with JudgeServer(lambda text, times: '{"score": 3}').running() as server:
        judge = EndpointJudge("m", server.url)
        verdicts(judge, ["a", "b", "c", "d", "e", "f"], cache)
        lines = {json.loads(line)["key"]: line for line in cache.read_bytes().splitlines()}
        keys = [prompt_key(judge.name, ask(text)) for text in "abcdef"]
        damaged = [
            lines[keys[0]],
            lines[keys[1]][:-9],
            json.dumps({"key": keys[2], "raw": 5}).encode(),
            json.dumps({"key": keys[3], "raw": '{"score": 77}'}).encode(),
            b'{"key": "\xff"}',
            b"[" * DEEP,
        ]
        cache.write_bytes(b"\n".join(damaged) + b"\n")
        server.asked.clear()
        assert all(verdict.fields == {"score": 3} for verdict in verdicts(judge, list("abcdef"), cache))
        assert sorted(server.asked) == list("bcdef")
        said = " ".join(caplog.messages)
        assert all(f"{cache}: line {number} is damaged" in said for number in (2, 3, 5, 6)), said
        assert "not within 0 to 5" in said
        caplog.clear()
        assert all(verdict.fields == {"score": 3} for verdict in verdicts(judge, list("abcdef"), cache))
    assert len(server.asked) == 5 and not caplog.messages


def test_a_run_that_was_killed_goes_on(tmp_path):
    cache = tmp_path / "replies.jsonl"
    with JudgeServer(lambda text, times: '{"score": 3}').running() as server:
        judge = EndpointJudge("m", server.url)
        verdicts(judge, ["a", "b"], cache)
        cache.write_bytes(cache.read_bytes()[:-9])  # the last line was being written
        assert [verdict.fields for verdict in verdicts(judge, ["a", "b"], cache)] == [{"score": 3}] * 2
    assert len(server.asked) == 3 and len(cache.read_text().splitlines()) == 2


def test_no_server_and_no_key(tmp_path, monkeypatch):
    judge = EndpointJudge("m", "http://127.0.0.1:9/v1", retries=0)
    with pytest.raises(JudgeError, match="Connection"):
        judge(ask("a"))
    assert "Connection" in verdicts(judge, ["a"], tmp_path / "replies.jsonl")[0].error
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        EndpointJudge("m", "http://127.0.0.1:9/v1")


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ('{"score": 3}', {"score": 3}),
        ("```json\n{\"score\": 3, \"why\": {\"a\": 1}}\n```", {"score": 3, "why": {"a": 1}}),
        ("{'pred': 'yes', 'score': 4}", {"pred": "yes", "score": 4}),
        ("of {the set} I think {'score': 2}", {"score": 2}),
    ],
)  # fmt: skip
def test_objects_are_found(reply, found):
    assert find_object(reply) == found


@pytest.mark.parametrize("reply", ["", "score: 3", "{''score': 4.8}", "[1]", "{", "{1, 2}", "__import__('os')"])
def test_nothing_to_find(reply):
    with pytest.raises(ValueError, match="no JSON object"):
        find_object(reply)


def test_fields():
    assert read_score({"score": "4"}) == {"score": 4.0} and read_score({"score": 4.8}) == {"score": 4.8}
    assert read_yes_no({"pred": " Yes ", "score": 5}) == {"right": True, "score": 5.0}
    assert read_yes_no({"pred": False, "score": 0}) == {"right": False, "score": 0.0}
    for wrong in ({"score": None}, {"score": True}, {"score": 6}, {"score": "high"}, {"score": float("nan")}):
        with pytest.raises(ValueError):
            read_score(wrong)
    with pytest.raises(ValueError, match="maybe"):
        read_yes_no({"pred": "maybe", "score": 1})


@pytest.fixture(scope="module")
def local_model(tmp_path_factory):
    """A random Llama whose last layer knows two words, each an object with a score of 4: one wins, whatever it saw."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from tests.chat.tiny_hosts import text_config

    words = ["<pad>", "<s>", "</s>", "<unk>", '{"score":4}', "{'score':4}", "rate", "this"]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    model = LlamaForCausalLM(text_config())
    direction = model.lm_head.weight.data[4].clone()
    model.lm_head.weight.data.zero_()
    model.lm_head.weight.data[4], model.lm_head.weight.data[5] = direction, -direction
    model.save_pretrained(folder / "no-chat")
    tokens.save_pretrained(folder / "no-chat")
    model.save_pretrained(folder / "chat")
    tokens.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    tokens.save_pretrained(folder / "chat")
    return folder


def test_a_model_on_this_machine(local_model, tmp_path):
    judge = LocalJudge(str(local_model / "chat"), "cpu", max_tokens=3)
    (verdict,) = verdicts(judge, ["rate this"], tmp_path / "replies.jsonl")
    assert verdict.fields == {"score": 4.0} and judge.name.endswith("(local)")
    with pytest.raises(ValueError, match="has no chat template"):
        LocalJudge(str(local_model / "no-chat"), "cpu")
