"""Who may ask the page's server, and what it lets a browser ask for."""

import pytest

from kto_jax.config import ConfigError

pytestmark = pytest.mark.browser


def answer(path="/", *, token="", host="127.0.0.1", **headers):
    """What the guard answers, or what is behind it."""
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route
    from starlette.testclient import TestClient

    from kto_jax.thumbs.serve import LOCAL, Guard

    behind = Starlette(routes=[Route("/{path:path}", lambda request: PlainTextResponse("the page"))])
    guard = Guard(behind, token, host in LOCAL)
    client = TestClient(guard, base_url=f"http://{headers.pop('host_header', host)}:7860", follow_redirects=False)
    return client.get(path, headers=headers)


def test_a_page_for_this_machine_answers_under_its_own_names_alone():
    assert [answer(host_header=name).status_code for name in ("127.0.0.1", "localhost", "evil.example")] == [
        200,
        200,
        403,
    ]
    assert answer(origin="http://127.0.0.1:7860").status_code == 200
    assert answer(origin="http://evil.example").status_code == answer(origin="null").status_code == 403


def test_visitors_need_the_token_once():
    refused = answer(token="t" * 20, host="192.0.2.7")
    assert refused.status_code == 401 and "The token is missing or wrong" in refused.text
    assert answer("/?token=wrong", token="t" * 20, host="192.0.2.7").status_code == 401
    assert answer("/?token=é", token="t" * 20, host="192.0.2.7").status_code == 401
    let_in = answer(f"/?token={'t' * 20}", token="t" * 20, host="192.0.2.7")
    assert let_in.status_code == 303 and let_in.headers["location"] == "/"
    cookie = let_in.headers["set-cookie"]
    assert "HttpOnly" in cookie and "samesite=lax" in cookie.lower()
    assert answer(token="t" * 20, host="192.0.2.7", cookie=cookie.partition(";")[0]).text == "the page"


def test_a_browser_may_ask_this_server_alone():
    for response in (answer(), answer(host_header="evil.example")):
        policy = response.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "http" not in policy


def test_a_port_that_is_taken_is_refused():
    from kto_jax.thumbs.serve import listen

    with listen("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match=r"cannot be listened on: .* Set --port"):
        listen("127.0.0.1", taken.getsockname()[1])
