"""Judges against a real HTTP server on this machine: what it is asked, how often, what is kept, and what a
killed run leaves.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from judge_server import running_server

from rlaifv_nb.benchmarks.judges import (
    BudgetSpent,
    JudgeError,
    JudgePrompt,
    judge_note,
    open_judge,
    parse_spec,
    read_judgements,
    request_body,
)
from rlaifv_nb.records import write_rows

KEY = "sk-a-very-secret-key-0123456789"


@pytest.fixture
def server():
    with running_server() as s:
        yield s


def ask(server, folder, texts, **options):
    judge = open_judge(server.spec, folder, **{"backoff": 0.01, "timeout": 5.0, **options})
    return judge, judge.ask([JudgePrompt(t) for t in texts])


def test_a_verdict_is_kept_with_all_that_led_to_it(server, tmp_path):
    judge = open_judge(
        server.spec, tmp_path, temperature=0.5, seed=3, max_new_tokens=99, extra={"top_p": 0.9}
    )
    (one,) = judge.ask([JudgePrompt("Which?", "Be fair.")])
    assert server.requests == [
        {
            "model": "echo",
            "temperature": 0.5,
            "seed": 3,
            "max_tokens": 99,
            "top_p": 0.9,
            "messages": [{"role": "system", "content": "Be fair."}, {"role": "user", "content": "Which?"}],
        }
    ]
    assert (one.text, one.finish_reason, one.version, one.prompt_tokens, one.answer_tokens) == (
        "heard: Which?",
        "stop",
        "echo-2 fp_7",
        7,
        3,
    )
    assert (one.kind, one.model, one.system, one.prompt) == ("endpoint", "echo", "Be fair.", "Which?")
    assert one.parameters == {
        "url": server.spec.split("|")[0],
        "temperature": 0.5,
        "seed": 3,
        "max_tokens": 99,
        "top_p": 0.9,
    }
    assert list(read_judgements(tmp_path).values()) == [one]


def test_what_is_known_is_not_asked_again_and_what_differs_is(server, tmp_path):
    _, first = ask(server, tmp_path, ["a", "b", "a"])
    assert sorted(server.prompts()) == ["a", "b"] and first[0] == first[2]
    judge, second = ask(server, tmp_path, ["b", "a"])
    assert second == [first[1], first[0]] and len(server.requests) == 2 and judge.budget.requests == 0
    judge.ask([JudgePrompt("a", draw="1"), JudgePrompt("a", "system")])
    ask(server, tmp_path, ["a"], temperature=0.7)
    assert len(server.requests) == 5


def test_draws_get_seeds_of_their_own(server, tmp_path):
    judge = open_judge(server.spec, tmp_path, seed=3, temperature=1.0)
    judge.ask([JudgePrompt("a", draw=str(k)) for k in range(4)])
    seeds = [r["seed"] for r in server.requests]
    assert len(set(seeds)) == 4 and 3 in seeds and all(0 <= s < 2**31 for s in seeds)


def test_requests_run_at_the_same_time_but_not_more_than_allowed(server, tmp_path):
    server.delay = 0.2
    texts = [f"p{i}" for i in range(16)]
    began = time.monotonic()
    _, found = ask(server, tmp_path, texts, concurrency=4)
    assert [j.prompt for j in found] == texts and [j.text for j in found] == [f"heard: {t}" for t in texts]
    assert server.most == 4 and time.monotonic() - began < 16 * 0.2 * 0.75


def test_overload_waits_as_long_as_the_server_asks(server, tmp_path):
    server.script = [{"status": 429, "headers": {"Retry-After": "1"}, "body": "slow down"}]
    judge, found = ask(server, tmp_path, ["a"])
    assert (
        found[0].text == "heard: a"
        and 0.95 < server.times[1] - server.times[0] < 3
        and judge.budget.requests == 2
    )


@pytest.mark.parametrize(
    "step",
    [
        {"status": 500},
        {"status": 503, "body": "x"},
        {"status": 200, "body": '{"choices": [{"mess'},
        {"status": 200, "body": '{"error": {"message": "overloaded"}}'},
        {"status": 200, "body": '{"choices": []}'},
    ],
)
def test_what_passes_is_tried_again(server, tmp_path, step):
    server.script = [step, step]
    _, found = ask(server, tmp_path, ["a"])
    assert found[0].text == "heard: a" and len(server.requests) == 3


def test_waits_grow(server, tmp_path):
    server.script = [{"status": 500}] * 3
    ask(server, tmp_path, ["a"], backoff=0.1)
    waits = [b - a for a, b in zip(server.times, server.times[1:])]
    assert waits[0] >= 0.1 and waits[1] >= 0.2 and waits[2] >= 0.4


@pytest.mark.parametrize(
    "step, said",
    [
        ({"status": 500, "body": "out of order"}, "HTTP 500 'out of order'"),
        ({"body": "<html>"}, "'<html>'"),
        ({"body": '{"choices": []}'}, "IndexError"),
    ],
)
def test_what_does_not_pass_is_one_error_and_the_rest_is_kept(server, tmp_path, step, said):
    server.script = [{}, {}] + [step] * 99
    with pytest.raises(JudgeError) as caught:
        ask(server, tmp_path, ["a", "b", "c", "d"], concurrency=1, retries=2)
    assert (
        said in str(caught.value)
        and "no answer in 3 attempts" in str(caught.value)
        and "2 of 4 judgements are missing" in str(caught.value)
    )
    assert len(server.requests) == 5 and sorted(j.prompt for j in read_judgements(tmp_path).values()) == [
        "a",
        "b",
    ]
    server.script = []
    _, found = ask(server, tmp_path, ["a", "b", "c", "d"])
    assert len(found) == 4 and server.prompts()[5:] in (["c", "d"], ["d", "c"])


@pytest.mark.parametrize("status", [400, 401, 404, 302])
def test_a_wrong_request_is_not_repeated(server, tmp_path, status):
    server.script = [
        {"status": status, "body": "no such model", "headers": {"Location": "http://127.0.0.1:9/"}}
    ] * 9
    with pytest.raises(JudgeError, match=f"HTTP {status} 'no such model'"):
        ask(server, tmp_path, ["a", "b"], concurrency=1)
    assert len(server.requests) == 1


def test_a_slow_server_times_out(server, tmp_path):
    server.script = [{"delay": 1.5}]
    _, found = ask(server, tmp_path, ["a"], timeout=0.3)
    assert found[0].text == "heard: a" and len(server.requests) == 2
    server.delay = 1.0
    with pytest.raises(JudgeError, match="ReadTimeout"):
        ask(server, tmp_path, ["b"], timeout=0.3, retries=1)


def test_nobody_listens(server, tmp_path):
    spec = server.spec
    server.shutdown()
    server.server_close()
    with pytest.raises(JudgeError, match="2 attempts.*Connection"):
        open_judge(spec, tmp_path, backoff=0.01, retries=1).ask([JudgePrompt("a")])


def test_a_certificate_is_checked(server, tmp_path):
    import ssl

    made = subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-keyout",
            tmp_path / "k.pem",
            "-out",
            tmp_path / "c.pem",
        ],
        capture_output=True,
    )
    if made.returncode:
        pytest.skip("needs openssl to make a certificate")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "c.pem", tmp_path / "k.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    with pytest.raises(JudgeError, match="(?i)certificate"):
        open_judge(server.spec.replace("http:", "https:"), tmp_path / "out").ask([JudgePrompt("a")])
    assert server.requests == []


def test_a_budget_of_requests_stops_cleanly_and_the_next_run_goes_on(server, tmp_path):
    texts = [f"p{i}" for i in range(10)]
    with pytest.raises(BudgetSpent, match="budget of 4 requests is spent. 6 of 10 judgements are missing"):
        ask(server, tmp_path, texts, max_requests=4, concurrency=3)
    assert len(server.requests) == 4 and len(read_judgements(tmp_path)) == 4
    _, found = ask(server, tmp_path, texts, max_requests=6)
    assert [j.text for j in found] == [f"heard: {t}" for t in texts] and len(server.requests) == 10


def test_a_budget_of_tokens(server, tmp_path):
    with pytest.raises(BudgetSpent, match="budget of 35 tokens is spent. 6 of 10"):
        ask(server, tmp_path, [f"p{i}" for i in range(10)], max_tokens=35, concurrency=1)
    server.script = [{"body": json.dumps({"choices": [{"message": {"content": "x"}}]})}]
    with pytest.raises(JudgeError, match="give max_requests"):
        ask(server, tmp_path, ["q"], max_tokens=35)


def test_retries_count_in_the_budget(server, tmp_path):
    server.script = [{"status": 500}] * 99
    with pytest.raises(BudgetSpent):
        ask(server, tmp_path, ["a"], max_requests=3, retries=9)
    assert len(server.requests) == 3


def test_the_key_is_sent_and_never_kept(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".netrc").write_text("machine 127.0.0.1 login other password other\n")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    judge = open_judge(f"{server.spec}|JUDGE_KEY", tmp_path / "out", backoff=0.01)
    judge.ask([JudgePrompt("a")])
    assert server.headers_seen[0]["Authorization"] == f"Bearer {KEY}"
    server.script = [{"status": 401, "body": "{auth} is no key"}]
    with pytest.raises(JudgeError) as caught:
        judge.ask([JudgePrompt("b")])
    write_rows(
        tmp_path / "out" / "more.jsonl",
        [{"identity": judge.identity, "judge": repr(judge), "error": str(caught.value)}],
    )
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert len(files) == 2 and not any(KEY in p.read_text() for p in files)
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ValueError, match="JUDGE_KEY is not set"):
        open_judge(f"{server.spec}|JUDGE_KEY", tmp_path / "out")


def test_a_broken_key_is_refused_without_telling_it(server, tmp_path):
    for broken in (f"{KEY}\n", f"Bearer {KEY}", "clé"):
        with pytest.raises(ValueError, match="the judge's key holds") as caught:
            open_judge(server.spec, tmp_path, api_key=broken)
        assert broken.strip() not in str(caught.value)


def test_no_key_is_sent_that_was_not_named(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    ask(server, tmp_path, ["a"])
    assert "Authorization" not in server.headers_seen[0]


CHILD = """
import sys
from rlaifv_nb.benchmarks.judges import JudgePrompt, open_judge
from rlaifv_nb.records import write_rows
spec, folder, table = sys.argv[1:]
found = open_judge(spec, folder, concurrency=2).ask([JudgePrompt(f"p{i}") for i in range(30)])
write_rows(table, found)
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(server, tmp_path):
    def start(folder, table):
        return subprocess.Popen([sys.executable, "-c", CHILD, server.spec, folder, table])

    assert start(tmp_path / "whole", tmp_path / "whole.jsonl").wait(60) == 0
    assert len(server.requests) == 30
    server.delay = 0.1
    child = start(tmp_path / "killed", tmp_path / "killed.jsonl")
    while len(server.requests) < 40:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    kept = read_judgements(tmp_path / "killed")
    assert 0 < len(kept) < 30 and not (tmp_path / "killed.jsonl").exists()
    (shard,) = (tmp_path / "killed").glob("*.jsonl")
    shard.write_bytes(shard.read_bytes() + b'{"key": "half a li')  # what a kill within a write leaves
    server.delay, before = 0.0, len(server.requests)
    assert start(tmp_path / "killed", tmp_path / "killed.jsonl").wait(60) == 0
    assert sorted(server.prompts()[before:]) == sorted(
        {f"p{i}" for i in range(30)} - {j.prompt for j in kept.values()}
    )
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_two_processes_share_a_folder(server, tmp_path):
    server.delay = 0.02
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, server.spec, tmp_path / "shared", tmp_path / f"{k}.jsonl"]
        )
        for k in range(2)
    ]
    assert [c.wait(60) for c in children] == [0, 0]
    assert len(read_judgements(tmp_path / "shared")) == 30
    assert (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "1.jsonl").read_bytes()


def test_a_local_judge(tmp_path):
    options = dict(max_new_tokens=48, batch_size=2)
    prompts = [
        JudgePrompt(f"Turn the fact into a question.\nFact: There are {n} dogs.\nQuestion:", system)
        for n, system in (("two", ""), ("three", ""), ("two", "Be brief."))
    ]
    judge = open_judge("local:packaged:iconworld-splitter", tmp_path, max_requests=2, **options)
    with pytest.raises(BudgetSpent, match="1 of 3"):
        judge.ask(prompts)
    found = open_judge("local:packaged:iconworld-splitter", tmp_path, **options).ask(prompts)
    assert len({j.key for j in found}) == 3 and all(
        j.kind == "local" and j.version == judge.version and j.answer_tokens for j in found
    )
    assert found == open_judge("local:packaged:iconworld-splitter", tmp_path / "other", **options).ask(
        prompts
    )
    with pytest.raises(JudgeError, match="do not fit into the 2048"):
        open_judge("local:packaged:iconworld-splitter", tmp_path, max_new_tokens=2040).ask(prompts)


@pytest.mark.parametrize(
    "spec, options, said",
    [
        ("gpt-4", {}, "local:MODEL.*or URL"),
        ("local:", {}, "local:MODEL"),
        ("https://u:pw@h.example/v1|m", {}, "plain address"),
        ("https://h.example/v1?api-key=pw|m", {}, "plain address"),
        ("local:packaged:nothing", {}, "not in this package"),
        ("local:packaged:iconworld-splitter", {"temperature": 0.5}, "greedily"),
    ],
)
def test_what_cannot_be_opened_says_why(tmp_path, spec, options, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        open_judge(spec, tmp_path, **options)
    assert "pw" not in str(caught.value)


def test_a_system_message_alone_and_a_removed_parameter():
    body = request_body(JudgePrompt("", "Extract."), "m", {"max_tokens": None, "temperature": 0})
    assert body == {"model": "m", "messages": [{"role": "system", "content": "Extract."}], "temperature": 0}


def test_a_retired_judge_is_named(tmp_path):
    judge = open_judge("https://api.example/v1|gpt-4-1106-preview", tmp_path)
    assert "gpt-4-1106-preview (retired: shut down on 2026-10-23)" in judge_note(judge)
    assert parse_spec("local:a/b") == ("local", "a/b", "", "")
