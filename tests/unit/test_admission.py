"""Which requests are refused, for how long, and in which order the others are served."""

from __future__ import annotations

import pytest

from serving.admission.admission_control import Admission, AdmissionLimits, Capacity, Permit
from serving.admission.rate_limits import duration
from serving.http.errors import APIError

CAPACITY = Capacity(max_sequences=4, kv_tokens=1000)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def new_admission(**limits: int) -> tuple[Admission, Clock]:
    clock = Clock()
    return Admission(AdmissionLimits(**limits), clock), clock


def admit(admission: Admission, client: str, answers: int, tokens: int, capacity: Capacity = CAPACITY) -> Permit:
    """As a request: before its prompt is tokenized, and after that."""
    permit = admission.admit(client, answers, capacity)
    permit.claim(tokens)
    return permit


def fill(admission: Admission, count: int, client: str = "", tokens: int = 10) -> list[Permit]:
    """Requests of as many clients, or of one."""
    return [admit(admission, client or f"client-{i}", 1, tokens) for i in range(count)]


def refusal(admission: Admission, client: str, answers: int = 1, tokens: int = 10) -> APIError:
    with pytest.raises(APIError) as caught:
        admit(admission, client, answers, tokens)
    assert caught.value.status == 429
    assert caught.value.code == "rate_limit_exceeded"
    return caught.value


def test_the_queue_is_bounded_in_answers() -> None:
    admission, _ = new_admission(max_queued_requests=2)
    permits = fill(admission, 6)
    assert refusal(admission, "late").type == "requests"
    permits[0].close(10)
    admit(admission, "late", 1, 10)


def test_the_queue_is_bounded_in_tokens() -> None:
    admission, _ = new_admission(max_queued_tokens=500)
    fill(admission, 3, tokens=500)
    assert refusal(admission, "late").type == "tokens"


def test_an_idle_server_takes_a_request_of_any_size() -> None:
    admission, _ = new_admission(max_queued_requests=0, max_queued_tokens=0)
    admit(admission, "one", 128, 100_000)
    assert admission.usage_table.in_flight() == (128, 100_000)


def test_retry_after_is_the_time_that_the_present_rate_needs() -> None:
    admission, clock = new_admission(max_queued_requests=0)
    for _ in range(120):  # one answer every half second, for a minute
        permit = admit(admission, "a", 1, 10)
        clock.now += 0.5
        permit.close(10)
    fill(admission, 4)
    assert refusal(admission, "late", answers=1).headers["retry-after"] == "1"
    assert 4 <= int(refusal(admission, "late", answers=10).headers["retry-after"]) <= 6


def test_those_that_are_refused_at_once_are_told_to_come_back_one_after_the_other() -> None:
    admission, clock = new_admission(max_queued_requests=40)
    for _ in range(120):  # two answers a second
        clock.now += 0.5
        admit(admission, "a", 1, 10).close(10)
    permits = fill(admission, 44)
    seconds = [int(refusal(admission, f"late-{i}").headers["retry-after"]) for i in range(200)]
    assert seconds[0] == 1
    assert sorted(seconds) == seconds
    assert 20 <= seconds[-1] <= 24  # no more than what the server can have in flight, at two a second
    for permit in permits[:20]:
        clock.now += 0.5
        permit.close(10)
        admit(admission, "returned", 1, 10)
    assert int(refusal(admission, "later").headers["retry-after"]) < seconds[-1]


def test_a_server_that_has_answered_nothing_yet_does_not_ask_for_a_try_every_second() -> None:
    admission, _ = new_admission(max_queued_requests=0)
    fill(admission, 4)
    assert refusal(admission, "late").headers["retry-after"] == "5"


def test_a_full_queue_refuses_before_the_prompt_is_tokenized() -> None:
    admission, _ = new_admission(max_queued_requests=0)
    fill(admission, 4)
    with pytest.raises(APIError):
        admission.admit("late", 1, CAPACITY)
    assert admission.usage_table.in_flight() == (4, 40)


def test_a_request_refused_for_its_tokens_takes_nothing_with_it() -> None:
    admission, _ = new_admission(tokens_per_minute=1000, max_queued_tokens=0)
    fill(admission, 1, client="other", tokens=900)
    permit = admission.admit("a", 1, CAPACITY)
    with pytest.raises(APIError):
        permit.claim(500)
    assert admission.usage_table.in_flight() == (1, 900)
    assert admission.num_answers == 1
    permit = admission.admit("a", 1, CAPACITY)
    permit.claim(100)
    assert permit.headers["x-ratelimit-remaining-tokens"] == "900"


def test_turns_count_the_tokens_that_were_used_and_not_those_that_were_asked_for() -> None:
    admission, _ = new_admission(max_queued_requests=1000)
    (wide,) = fill(admission, 1, client="wide", tokens=2000)
    (narrow,) = fill(admission, 1, client="narrow", tokens=200)
    for permit in (wide, narrow):
        permit.started()
        permit.close(100)
    assert fill(admission, 1, client="wide", tokens=2000)[0].priority == 100
    assert fill(admission, 1, client="narrow", tokens=200)[0].priority == 100


def test_headers_tell_the_limit_what_remains_and_when_it_is_free_again() -> None:
    admission, _ = new_admission(max_queued_requests=4)
    permit = admit(admission, "a", 2, 100)
    assert permit.headers["x-ratelimit-limit-requests"] == "6"  # three quarters of eight
    assert permit.headers["x-ratelimit-remaining-requests"] == "4"
    assert set(permit.headers) == {
        f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens")
    }


def test_one_client_cannot_fill_the_queue() -> None:
    admission, _ = new_admission(max_queued_requests=4)
    fill(admission, 6, client="greedy")
    refusal(admission, "greedy")
    assert admit(admission, "modest", 1, 10).priority == 0


def test_two_hundred_requests_of_one_client_do_not_delay_another_client() -> None:
    admission, _ = new_admission(max_queued_requests=1000)
    many = fill(admission, 200, client="greedy")
    for permit in many[:10]:
        permit.started()
    (one,) = fill(admission, 1, client="modest")
    assert sum(permit.priority < one.priority for permit in many) <= 10  # only those that run already


def test_no_request_waits_for_ever_behind_new_clients() -> None:
    """With a priority that only counts a client's waiting requests, its second request would never be served."""
    admission, _ = new_admission(max_queued_requests=10_000)
    patient = fill(admission, 2, client="patient")[1]
    for i in range(10):
        (newcomer,) = fill(admission, 1, client=f"newcomer-{i}")
        newcomer.started()
        patient_goes_first = patient.priority < newcomer.priority
    (last,) = fill(admission, 1, client="newcomer-0")
    last.started()
    (after,) = fill(admission, 1, client="newcomer-0")
    assert not patient_goes_first
    assert patient.priority <= after.priority


def test_requests_per_minute_of_one_client() -> None:
    admission, clock = new_admission(requests_per_minute=3)
    for permit in fill(admission, 3, client="a"):
        permit.close(10)
    error = refusal(admission, "a")
    assert error.headers["retry-after"] == "20"
    assert error.headers["x-ratelimit-remaining-requests"] == "0"
    fill(admission, 1, client="b")
    clock.now += 20
    fill(admission, 1, client="a")


def test_unused_tokens_of_a_minute_are_given_back() -> None:
    admission, _ = new_admission(tokens_per_minute=1000)
    (permit,) = fill(admission, 1, client="a", tokens=900)
    refusal(admission, "a", tokens=500)
    permit.close(100)
    fill(admission, 1, client="a", tokens=500)


def test_a_request_larger_than_a_minutes_tokens_is_not_to_be_tried_again() -> None:
    admission, _ = new_admission(tokens_per_minute=1000)
    error = refusal(admission, "a", tokens=1001)
    assert error.headers["x-should-retry"] == "false"
    assert "retry-after" not in error.headers


def test_requests_of_one_client_at_once() -> None:
    admission, _ = new_admission(max_concurrent=2)
    permits = fill(admission, 2, client="a")
    refusal(admission, "a")
    permits[0].close(None)
    permits[0].close(None)  # twice is once
    fill(admission, 1, client="a")
    refusal(admission, "a")


def test_idle_clients_are_forgotten() -> None:
    admission, clock = new_admission(requests_per_minute=60)
    for i in range(10_000):
        permit = admit(admission, f"address-{i}", 1, 10)
        permit.started()
        permit.close(10)
        clock.now += 1
    assert len(admission._clients) < 5000  # private: what is remembered shows nowhere else but in the memory used
    assert admission.num_answers == 0
    assert admission.usage_table.in_flight() == (0, 0)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0ms"), (0.12, "120ms"), (6, "6s"), (59.2, "1m0s"), (360, "6m0s")])
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text
