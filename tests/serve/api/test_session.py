"""Sign-in for web pages: sessions, one-use codes, Origin checks and sign-out."""

import pytest

from skyloom.serve.queue.sessions import CODE_SECONDS, MAX_PER_OWNER, SESSION_SECONDS

from .conftest import HOST, TOKEN

ORIGIN = {"origin": f"http://{HOST}"}
COOKIE = f"skyloom_session_{HOST.split(':')[1]}"


def sign_in(server, key: str, **headers: str):
    """A page that has signed in with a key or a code."""
    page = server.http(None)
    answer = page.post("/v1/session", headers={"authorization": f"Bearer {key}", **headers})
    return page, answer


def test_a_key_signs_a_page_in_and_out(server):
    key = server.key("ada")
    page, answer = sign_in(server, key)
    assert answer.json()["owner"] == "ada"
    assert answer.json()["scopes"] == ["read", "write"]
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(f"{COOKIE}=")
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "Path=/" in cookie
    assert f"Max-Age={SESSION_SECONDS}" in cookie
    assert "Secure" not in cookie
    assert key not in cookie
    made = page.post("/v1/videos", json={"prompt": "a cat"}, headers=ORIGIN)
    assert made.status_code == 200
    assert page.get(f"/v1/videos/{made.json()['id']}").status_code == 200
    assert page.get("/v1/session").json()["expires_at"] == answer.json()["expires_at"]
    copied = page.cookies[COOKIE]
    assert page.delete("/v1/session", headers=ORIGIN).json()["deleted"]
    assert COOKIE not in page.cookies
    assert page.get("/v1/videos").status_code == 401
    thief = server.http(None, cookies={COOKIE: copied})
    assert thief.get("/v1/videos").json()["error"]["code"] == "invalid_session"


def test_a_cookie_is_secure_where_the_page_is(make_server, tmp_path):
    _, answer = sign_in(make_server(tmp_path), TOKEN, origin=f"https://{HOST}")
    assert "Secure" in answer.headers["set-cookie"]


def test_a_code_signs_in_once(server):
    key = server.key("ada", "write")
    made = server.http(key).post("/v1/session/codes").json()
    page, answer = sign_in(server, made["code"])
    assert answer.json()["owner"] == "ada"
    assert answer.json()["scopes"] == ["write"]
    assert page.post("/v1/videos", json={"prompt": "a cat"}, headers=ORIGIN).status_code == 200
    assert page.get("/v1/videos").json()["error"]["code"] == "insufficient_scope"
    _, again = sign_in(server, made["code"])
    assert again.status_code == 401
    assert again.json()["error"]["code"] == "invalid_code"
    assert server.http(made["code"]).get("/v1/videos").status_code == 401


def test_codes_and_sessions_expire(server):
    database = server.services.database
    code = server.http().post("/v1/session/codes").json()["code"]
    page, _ = sign_in(server, TOKEN)
    start = database.now()
    database._clock = lambda: start + CODE_SECONDS + 1
    assert sign_in(server, code)[1].status_code == 401
    assert page.get("/v1/videos").status_code == 200
    database._clock = lambda: start + SESSION_SECONDS + 1
    assert page.get("/v1/videos").status_code == 401


def test_a_revoked_key_ends_its_sessions_and_codes(server):
    info, key = server.services.keys.create("ada")
    page, _ = sign_in(server, key)
    code = server.http(key).post("/v1/session/codes").json()["code"]
    server.services.keys.revoke(info.id)
    assert page.get("/v1/videos").status_code == 401
    assert sign_in(server, code)[1].status_code == 401


def test_a_session_of_the_token_ends_with_the_run(server, make_server, tmp_path):
    page, _ = sign_in(server, TOKEN)
    assert page.get("/v1/videos").status_code == 200
    server.services.keys._token = "another run's"
    assert page.get("/v1/videos").status_code == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (ORIGIN, 200),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"sec-fetch-site": "none"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({**ORIGIN, "sec-fetch-site": "cross-site"}, 403),
    ],
)
def test_a_cookie_changes_things_only_from_an_own_page(server, headers, status):
    page, _ = sign_in(server, TOKEN)
    answer = page.post("/v1/videos", json={"prompt": "a cat"}, headers=headers)
    assert answer.status_code == status


def test_a_header_wins_over_a_cookie(server):
    page, _ = sign_in(server, server.key("ada"))
    wrong = {"authorization": "Bearer sk-sky-wrong"}
    assert page.get("/v1/videos", headers=wrong).status_code == 401


def test_sessions_and_codes_of_an_owner_are_bounded(server):
    sessions, caller = server.services.sessions, server.services.keys.authenticate
    ada = caller(f"Bearer {server.key('ada')}")
    cookies = [sessions.create(ada)[0] for _ in range(MAX_PER_OWNER + 1)]
    assert sessions.expiry(cookies[0]) is None
    assert sessions.expiry(cookies[1]) is not None
    codes = [sessions.create_code(ada)[0] for _ in range(MAX_PER_OWNER + 1)]
    assert sessions.redeem(codes[-1]) == ada


@pytest.mark.parametrize("cookie", ["", "x", "x" * 10_000, "\u00e9"])
def test_foreign_cookies_are_refused(server, cookie):
    page = server.http(None)
    answer = page.get("/v1/videos", headers={b"cookie": f"{COOKIE}={cookie}".encode("latin-1")})
    assert answer.status_code == 401


def test_the_database_holds_no_secret(server):
    code = server.http().post("/v1/session/codes").json()["code"]
    page, _ = sign_in(server, TOKEN)
    with server.services.database.read() as connection:
        tables = ("sessions", "sign_in_codes")
        rows = [connection.exec_driver_sql(f"SELECT * FROM {name}").all() for name in tables]
    assert all(rows)
    assert code not in str(rows)
    assert page.cookies[COOKIE] not in str(rows)
