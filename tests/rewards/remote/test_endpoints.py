"""Which server gets a request, and when: with scripted servers."""

import collections
import random
import threading
import time

import pytest

from rewards.base import RewardError
from rewards.remote.endpoints import FIRST_PAUSE, LONGEST_PAUSE, Endpoints, pause
from tests.rewards.serving import scripted, trickling


def endpoints(*urls, **options):
    options = {"timeout": 5.0, "patience": 5.0, "first_pause": 0.02, "seed": 0} | options
    return Endpoints(urls, "/health", lambda answer: None, **options)


def ask(client):
    return client.post("/work", [b"question"], "text/plain")


def works(method, path, headers, body):
    return 200, {"path": path, "body": body.decode()}


def test_pauses_double_and_differ_by_chance_only():
    assert [pause(n, 0.0) for n in (1, 2, 3, 4, 5, 50)] == [
        FIRST_PAUSE,
        1,
        2,
        4,
        LONGEST_PAUSE,
        LONGEST_PAUSE,
    ]
    assert pause(3, 0.999) == pytest.approx(1, abs=1e-2)
    one, other = random.Random(7), random.Random(7)
    assert [pause(n, one.random()) for n in range(1, 9)] == [
        pause(n, other.random()) for n in range(1, 9)
    ]


def test_paths_of_a_url_are_kept():
    with scripted(works) as url:
        assert ask(endpoints(url + "/behind/a/proxy/"))["path"] == "/behind/a/proxy/work"


@pytest.mark.slow
def test_the_server_with_the_fewest_requests_is_asked():
    counts, at_once, most = collections.Counter(), collections.Counter(), collections.Counter()
    lock = threading.Lock()

    def server(name, seconds):
        def answer(method, path, headers, body):
            if path == "/work":
                with lock:
                    counts[name] += 1
                    at_once[name] += 1
                    most[name] = max(most[name], at_once[name])
                time.sleep(seconds)
                with lock:
                    at_once[name] -= 1
            return 200, {}

        return answer

    with scripted(server("fast", 0.02)) as fast, scripted(server("slow", 0.2)) as slow:
        client = endpoints(fast, slow)
        ask(client), ask(client)
        assert counts == {"fast": 1, "slow": 1}  # in turns when nothing is under way
        threads = [
            threading.Thread(target=lambda: [ask(client) for _ in range(8)]) for _ in range(4)
        ]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert counts.total() == 34 and counts["fast"] > 2 * counts["slow"] and max(most.values()) <= 4


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "failure",
    [(500, {"detail": "broken"}), (502, b"<html>"), (200, b"no JSON"), (200, b"late", 0.6)],
)
def test_a_failing_server_is_left_and_tried_again_later(failure):
    broken, asked = threading.Event(), []

    def flaky(method, path, headers, body):
        asked.append(path)
        return failure if broken.is_set() else works(method, path, headers, body)

    with scripted(flaky) as first, scripted(works) as second:
        client = endpoints(first, second, timeout=0.3)
        broken.set()
        assert all(ask(client)["body"] == "question" for _ in range(4))
        assert asked.count("/work") == 1  # the others went to the second one
        broken.clear()
        deadline = time.monotonic() + 10
        while asked.count("/work") < 2:
            ask(client)
            assert time.monotonic() < deadline
        client.close()


def test_a_busy_server_is_asked_again_and_is_not_down():
    answers = iter([(503, {"detail": "full"}), (429, {"detail": "full"}), (200, "done")])

    def busy(method, path, headers, body):
        return next(answers) if path == "/work" else (200, {})

    with scripted(busy) as url:
        assert ask(endpoints(url, retries=0)) == "done"


def test_a_server_busy_for_too_long_is_an_error():
    with scripted(
        lambda method, path, headers, body: (503 if path == "/work" else 200, {"detail": "full"})
    ) as url:
        with pytest.raises(RewardError, match=r"busy for 0\.1 s \(503 full\): start more"):
            ask(endpoints(url, patience=0.1))


def test_a_refused_request_is_not_repeated():
    asked = []

    def refuses(method, path, headers, body):
        asked.append(path)
        return (413, {"detail": "too large: send less"}) if path == "/work" else (200, {})

    with scripted(refuses) as first, scripted(refuses) as second:
        with pytest.raises(RewardError, match="refused the request: 413 too large: send less"):
            ask(endpoints(first, second))
    assert asked.count("/work") == 1


def test_attempts_are_limited():
    with scripted(
        lambda method, path, headers, body: (500 if path == "/work" else 200, {"detail": "no"})
    ) as url:
        with pytest.raises(RewardError, match=r"in 3 attempts: .*answered 500 no"):
            ask(endpoints(url, retries=2))


def test_why_a_server_is_not_used_is_logged_when_it_changes(caplog):
    health = [500]
    with scripted(works) as good, scripted(lambda *_: (health[0], {"detail": "why"})) as url:
        client = endpoints(good, url)
        health[0] = 404
        wait = time.monotonic() + 10
        while sum("404 why" in record.message for record in caplog.records) == 0:
            assert time.monotonic() < wait
            time.sleep(0.01)
        time.sleep(0.1)
        client.close()
    messages = [record.message for record in caplog.records if url in record.message]
    assert [message.split(": ", 1)[1] for message in messages] == [
        "answered 500 why",
        "answered 404 why",
    ]


@pytest.mark.parametrize(
    "answer, message",
    [
        (b"\x1b[31m\x00\r\n", "no valid HTTP answer"),
        (b"HTTP/1.1 500 x\r\n\r\n\x1b[31m\r\nno", r"answered 500 \[31m  no\. Start"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 600 + b"]" * 600, "JSON .*deeper than 64"),
        (b"", "disconnected"),
    ],
)
def test_what_a_server_writes_is_one_printable_line(answer, message):
    with trickling(answer) as url, pytest.raises(RewardError, match=message) as error:
        endpoints(url, retries=0, patience=0.0)
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


def test_an_outage_costs_the_patience_once():
    dead = threading.Event()
    with scripted(lambda *_: (500, {}) if dead.is_set() else (200, "fine")) as url:
        client = endpoints(url, patience=0.5, retries=9)
        dead.set()
        start = time.monotonic()
        with pytest.raises(
            RewardError, match=r"no reward server works, for more than 0\.5 s: .*500"
        ):
            ask(client)
        assert 0.4 < time.monotonic() - start < 3
        start = time.monotonic()
        with pytest.raises(RewardError, match="no reward server works"):
            ask(client)
        assert time.monotonic() - start < 0.2
        dead.clear()  # and ends by itself
        deadline = time.monotonic() + 10
        while True:
            try:
                assert ask(client) == "fine"
                break
            except RewardError:
                assert time.monotonic() < deadline
                time.sleep(0.02)


def test_requests_wait_for_a_server_to_come_back():
    dead = threading.Event()
    with scripted(lambda *_: (500, {}) if dead.is_set() else (200, "fine")) as url:
        client = endpoints(url, retries=1)
        dead.set()
        threading.Timer(0.3, dead.clear).start()
        assert ask(client) == "fine"


def test_close_ends_what_waits():
    errors = []
    with scripted(lambda method, path, *_: (200, {}, 3.0 if path == "/work" else 0)) as url:
        client = endpoints(url, timeout=30)

        def waits():
            try:
                ask(client)
            except RewardError as error:
                errors.append(str(error))

        thread = threading.Thread(target=waits)
        thread.start()
        time.sleep(0.2)
        start = time.monotonic()
        client.close()
        thread.join()
        assert time.monotonic() - start < 1 and "closed" in errors[0]


def test_the_start():
    with scripted(works) as url, scripted(lambda *_: (401, {"detail": "who are you"})) as guarded:
        # one that works is enough
        assert ask(endpoints("http://127.0.0.1:9", url))["path"] == "/work"
        with pytest.raises(
            RewardError, match=r"refused the token \(401 who are you\).*token_env"
        ) as error:
            endpoints(url, guarded, token="a-secret")
        assert "a-secret" not in str(error.value)
    with (
        scripted(lambda *_: (404, {"detail": "Not Found"})) as url,
        pytest.raises(RewardError, match="404 Not Found"),
    ):
        endpoints(url)
    with pytest.raises(
        RewardError, match=r"no reward server works: http://127\.0\.0\.1:9: .*refused.*Start one"
    ):
        endpoints("http://127.0.0.1:9")


def test_unusable_settings():
    for options in ({"timeout": 0}, {"retries": -1}, {"patience": -1}, {"first_pause": 0}):
        with pytest.raises(ValueError, match="must be above 0"):
            endpoints("http://cpu1", **options)
    with pytest.raises(ValueError, match="no HTTP header") as error:
        endpoints("http://cpu1", token="a-secret\nHost: other")
    assert "secret" not in str(error.value)
    for urls in ((), "http://cpu1"):
        with pytest.raises(ValueError, match="give a list"):
            Endpoints(urls, "/health", lambda answer: None)
