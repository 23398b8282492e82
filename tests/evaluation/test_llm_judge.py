"""A language model as judge, played by a server on this machine."""

import json

import numpy as np
import pytest

from kto_jax.config import ConfigError, TransientError
from kto_jax.evaluation import llm_judge
from kto_jax.evaluation.completions import Answer
from kto_jax.evaluation.llm_judge import Endpoint, ask_in_both_orders, estimate_cost, read_verdict
from kto_jax.evaluation.pair_judges import ModelJudge
from kto_jax.evaluation.verdicts import win_rate
from tests.evaluation.judge_server import longer_wins, serve  # noqa: F401 (a fixture)


def answers(*texts):
    return [Answer(f"prompt {i}", text, str(i)) for i, text in enumerate(texts)]


def endpoint(server, **changes):
    return Endpoint(**({"url": server.url, "model": "judge", "first_wait": 0.0, "attempts": 3} | changes))


def test_both_orders_are_asked_and_the_key_is_sent(serve, monkeypatch):  # noqa: F811
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    server = serve(longer_wins)
    first, second = ask_in_both_orders(endpoint(server), answers("long one", "x", "ab"), answers("no", "longer", "cd"))
    assert first.tolist() == second.tolist() == [1, 0, 0.5]
    assert len(server.questions) == 6
    assert {body["model"] for body in server.questions} == {"judge"}
    assert all(headers["Authorization"] == "Bearer a-key" for headers in server.headers)


def test_a_judge_that_prefers_the_first_answer_is_found_out(serve):  # noqa: F811
    server = serve(lambda *_: "[[A>B]]")
    judged = ModelJudge("judge", endpoint(server)).judge(answers(*"abcdefgh"), answers(*"ijklmnop"))
    found = win_rate(judged.verdicts)
    assert found.rate.value == 0.5 and found.ties == 8
    assert found.positions.first_wins.value == 1 and found.positions.is_biased
    assert found.positions.contradictions == 1


def test_answers_are_cached_and_equal_questions_asked_once(serve):  # noqa: F811
    server = serve(longer_wins)
    for _ in range(2):
        first, _ = ask_in_both_orders(endpoint(server), answers("same", "same"), answers("b", "b"))
    assert first.tolist() == [1, 1]
    assert len(server.questions) == 4  # other prompts, so other questions; none twice
    ask_in_both_orders(endpoint(server), [answers("x")[0]] * 3, [answers("y")[0]] * 3)
    assert len(server.questions) == 6


def test_nonsense_is_a_verdict_that_could_not_be_read(serve):  # noqa: F811
    server = serve(lambda path, text, number: "I like both!" if "prompt 0" in text else "[[B>A]]")
    judged = ModelJudge("judge", endpoint(server)).judge(answers("a", "b", "c"), answers("d", "e", "f"))
    found = win_rate(judged.verdicts)
    assert (found.failures, found.pairs) == (1, 2)
    assert np.isnan(judged.verdicts.shares[0])


def test_a_failing_server_is_asked_again(serve):  # noqa: F811
    server = serve(lambda path, text, number: (502, "busy") if number <= 2 else "[[A=B]]")
    first, _ = ask_in_both_orders(endpoint(server, parallel=1), answers("a"), answers("b"))
    assert first.tolist() == [0.5]
    assert len(server.questions) == 4


def test_a_server_that_stays_down_is_a_transient_error_and_answers_are_kept(serve):  # noqa: F811
    server = serve(lambda path, text, number: "[[A>B]]" if number == 1 else (500, b"out of order"))
    with pytest.raises(TransientError, match=r"failed 3 times \(500: out of order\).*answers so far are kept"):
        ask_in_both_orders(endpoint(server, parallel=1), answers("a"), answers("b"))
    asked = len(server.questions)
    server.reply = lambda *_: "[[B>A]]"
    first, second = ask_in_both_orders(endpoint(server), answers("a"), answers("b"))
    assert (first.tolist(), second.tolist()) == ([1], [1])  # the first answer is the one that was kept
    assert len(server.questions) == asked + 1


def test_no_server_at_all_is_a_transient_error(serve):  # noqa: F811
    server = serve(longer_wins)
    server.shutdown()
    server.server_close()
    with pytest.raises(TransientError, match="failed 2 times"):
        ask_in_both_orders(endpoint(server, attempts=2), answers("a"), answers("b"))


@pytest.mark.parametrize(
    ("reply", "message"),
    [((401, b"no such key"), r"refused a question \(401: no such key\)"), (b"<html>", "answered '<html>'"),
     (json.dumps({"choices": []}).encode(), "It must answer as OpenAI's chat API does")],
)  # fmt: skip
def test_an_endpoint_of_another_kind_is_refused_at_once(serve, reply, message):  # noqa: F811
    server = serve(lambda *_: reply if isinstance(reply, tuple) else (200, reply))
    with pytest.raises(ConfigError, match=message):
        ask_in_both_orders(endpoint(server, parallel=1), answers("a"), answers("b"))
    assert len(server.questions) <= 2


@pytest.mark.parametrize(
    ("text", "share"),
    [("[[A>B]]", 1), ("[[B]]", 0), ("[[C]]", 0.5), ("[[ b >> a ]] ", 0), ("first [[A>B]], no: [[A=B]]", 0.5),
     ("[[A<B]]", 0), ("A is better", None), ("", None), ("[[AB]]", None)],
)  # fmt: skip
def test_the_last_verdict_of_an_answer_counts(text, share):
    assert read_verdict(text) == share


def test_the_cost_counts_two_questions_for_each_pair():
    cost = estimate_cost(Endpoint(max_tokens=100), ["a" * 400, "b" * 400], num_samples=3, max_new_tokens=50)
    assert cost.questions == 12 and cost.tokens_out == 1200
    assert cost.tokens_in == pytest.approx(12 * (100 + 100 + 40 + len(llm_judge.INSTRUCTIONS) / 4), abs=12)
    assert cost.dollars((1e6, 2e6)) == cost.tokens_in + 2 * cost.tokens_out
