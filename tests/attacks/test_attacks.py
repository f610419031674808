"""Attacks by one client must not affect other clients.

Each case runs with a concurrent client whose calls must all succeed. The attack must be rejected,
limited or disconnected, and the process must stay alive; durations are not asserted. The SIGTERM
case runs last.
"""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attack_cases as cases
import pytest
from attack_server import HANGS, HELD, wait_for

MIB = 2**20
MAX_MIB = 600  # peak resident memory of the server during all cases


@contextlib.contextmanager
def beside(stand, *, dropped: bool = False) -> Iterator[cases.Beside]:
    """Run the concurrent client during the block; assert that its calls succeed (at least four).

    With `dropped`, connections may close without a response, as in a flood from the same address.
    """
    with cases.Beside(stand.other) as other:
        yield other
        served = other.served
        wait_for(
            "the other client is served",
            lambda: other.served >= served + 4 or (other.failed and not dropped),
        )
    assert not [failure for failure in other.failed if not (dropped and failure[1] == 0)]
    assert stand.server.process.poll() is None


def memory_mib(stand, name: str = "VmRSS") -> float:
    """Return the current (VmRSS) or peak (VmHWM) resident memory of the server process."""
    rows = Path(f"/proc/{stand.server.process.pid}/status").read_text().splitlines()
    return next(int(row.split()[1]) / 1024 for row in rows if row.startswith(name))


def test_45_plans_of_one_key_take_two_threads(stand):
    mark = stand.data / HELD
    mark.touch()
    answers: list[cases.Answer] = []
    body = json.dumps({"prompt": "a cat"}).encode()

    def ask() -> None:
        answers.append(stand.attacker.ask("POST", "/v1/videos/plan", cases.JSON, body))

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(45)]
    with beside(stand):
        for thread in threads:
            thread.start()
        wait_for("43 are refused while two wait", lambda: len(answers) >= 43)
        assert {(answer.status, answer.code) for answer in answers} == {
            (429, "rate_limit_exceeded")
        }
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers)
        assert stand.other.ask("GET", "/health").status == 200
    assert sum(thread.is_alive() for thread in threads) == 2
    mark.unlink()
    for thread in threads:
        thread.join()
    assert sorted(answer.status for answer in answers) == [200] * 2 + [429] * 43


def test_30_mib_of_escapes_are_refused(stand):
    with beside(stand):
        refused = cases.escapes(stand.attacker)
        assert (refused.status, refused.code) == (400, "invalid_json")
        longer = cases.escapes(stand.attacker, "/v1/webhook_endpoints")
        assert (longer.status, longer.code) == (413, "request_too_large")


def test_json_in_utf_16_is_refused_whatever_it_holds(stand):
    with beside(stand):
        refused = cases.utf16(stand.attacker)
    assert (refused.status, refused.code) == (400, "invalid_json")
    assert "UTF-8" in refused.body["error"]["message"]


def test_forms_of_large_texts_are_refused_and_their_memory_is_given_back(stand):
    before = memory_mib(stand)
    with beside(stand), ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: cases.fields(stand.attacker), range(3)))
    assert {answer.status for answer in answers} <= {413, 429}
    assert any(answer.code == "request_too_large" for answer in answers)
    assert all(answer.code in ("request_too_large", "rate_limit_exceeded") for answer in answers)
    wait_for("memory is given back", lambda: memory_mib(stand) < before + 60)


@pytest.mark.parametrize("source", ["127.0.0.1", "127.0.0.2"])
def test_520_half_open_connections_keep_nobody_out(stand, source):
    """From the address of the concurrent client, and from another one."""
    attacker = cases.Client(stand.server.url, None, source)
    with beside(stand, dropped=source == stand.other.source):
        lines = cases.half_open(attacker)
        try:
            ends = [cases.end_of(line) for line in lines]
        finally:
            cases.close(lines)
    responses = [end for end in ends if end]
    assert all(end.startswith((b"HTTP/1.1 408 ", b"HTTP/1.1 503 ")) for end in responses)
    assert all(b'"request_timeout"' in end or b'"too_many_connections"' in end for end in responses)


def test_heads_and_bodies_that_drip_are_closed(stand):
    with beside(stand), cases.dripping(stand.attacker) as lines:
        ends = [cases.end_of(line) for line in lines]
    assert all(b'"request_timeout"' in end for end in ends if end)
    assert any(ends)


def test_uploads_over_the_limit_of_an_owner_are_rejected(stand):
    """Four uploads of an owner run at once, four wait, others get 429; other owners can upload."""
    with beside(stand):
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda _: _upload(stand.attacker), range(12)))
        assert {answer.status for answer in answers} <= {200, 429}
        assert _upload(stand.other).status == 200


def test_a_webhook_endpoint_that_drips_keeps_nobody_elses_back(stand):
    with cases.Endpoint(drips=True) as tarpit, cases.Endpoint(drips=False) as good, beside(stand):
        for _ in range(3):
            cases.add_webhook(stand.attacker, tarpit.url)
        cases.add_webhook(stand.third, good.url)
        slow = [cases.make_video(stand.attacker, f"a slow cat {number}") for number in range(6)]
        wait_for(
            "the attacker's are ended",
            lambda: all(cases.status_of(stand.attacker, v) == "completed" for v in slow),
        )
        wait_for("the tarpit has a delivery", lambda: tarpit.called)
        before = good.called
        mine = cases.make_video(stand.third, "a quick cat")
        wait_for("the other's is ended", lambda: cases.status_of(stand.third, mine) == "completed")
        wait_for("the other owner's webhook is delivered", lambda: good.called > before)


def test_a_render_that_hangs_is_ended_and_the_queue_goes_on(stand):
    with beside(stand):
        stuck = cases.make_video(stand.attacker, HANGS)
        after = cases.make_video(stand.third, "a cat behind it")
        wait_for(
            "the stuck job has failed", lambda: cases.status_of(stand.attacker, stuck) == "stalled"
        )
        wait_for("the queue goes on", lambda: cases.status_of(stand.third, after) == "completed")


def test_sigterm_ends_the_server_whatever_clients_hold_open(stand):
    """Unread downloads, event streams, incomplete headers and bodies, and two plans in progress."""
    file = cases.keep_file(stand.attacker, 64 * MIB)
    body = json.dumps({"prompt": "a cat"}).encode()
    video = stand.attacker.ask("POST", "/v1/videos", cases.JSON, body).body["id"]
    (stand.data / HELD).touch()
    lines: list[socket.socket] = cases.hold_open(stand.attacker, file, video)
    asking = [stand.attacker.connect() for _ in range(2)]
    for line in asking:
        headers = {**cases.JSON, "content-length": str(len(body))}
        line.sendall(stand.attacker.head("POST", "/v1/videos/plan", headers) + body)
    with beside(stand):
        peak = memory_mib(stand, "VmHWM")
    stand.server.process.terminate()
    try:
        assert stand.server.process.wait(120) == 0
    finally:
        cases.close([*lines, *asking])
    assert peak < MAX_MIB


def _upload(client: cases.Client) -> cases.Answer:
    disposition = 'content-disposition: form-data; name="file"; filename="a.png"'
    head = f"--{cases.BOUND}\r\n{disposition}\r\n\r\n".encode()
    end = f"\r\n--{cases.BOUND}--\r\n".encode()
    return client.ask("POST", "/v1/files", cases.FORM, head + cases.PNG + end)
