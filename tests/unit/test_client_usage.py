"""Usage over several workers: nothing is counted twice, lost, or held by an ended worker."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.admission import client_usage
from serving.admission.admission_control import Admission, AdmissionLimits, Capacity, Permit
from serving.admission.client_usage import UsageTable
from serving.http.errors import APIError
from tests.golden_data import REPOSITORY

CAPACITY = Capacity(max_sequences=2, kv_tokens=1000)
RESERVES_AND_WAITS = """
import sys
from pathlib import Path
from serving.admission.client_usage import UsageTable
table = UsageTable(Path(sys.argv[1]), 4)
reservation = table.claim(table.reserve("alice", 3), 300)
table.store_allowance(reservation, 1.0, 5.0, 1000.0)
print("reserved", flush=True)
sys.stdin.read()
"""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Workers:
    """Admission of several workers that share one folder."""

    def __init__(self, folder: Path, count: int, limits: AdmissionLimits) -> None:
        self.clock = Clock()
        self.tables = [UsageTable(folder, 2 * count) for _ in range(count)]
        self.admissions = [Admission(limits, self.clock, table) for table in self.tables]
        self.refresh()
        self.refresh()  # the first did not see the last one

    def refresh(self) -> None:
        for table in self.tables:
            table.refresh()

    def admit(self, worker: int, client: str = "alice", answers: int = 1, tokens: int = 10) -> Permit:
        permit = self.admissions[worker].admit(client, answers, CAPACITY)
        permit.claim(tokens)
        return permit

    def refused(self, worker: int, client: str = "alice", answers: int = 1, tokens: int = 10) -> APIError:
        with pytest.raises(APIError) as caught:
            self.admit(worker, client, answers, tokens)
        assert caught.value.status == 429
        return caught.value


@pytest.fixture
def dead_worker(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A running process that has three answers of alice's in flight."""
    with subprocess.Popen(
        [sys.executable, "-c", RESERVES_AND_WAITS, str(tmp_path)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reserved\n"
        yield process
        process.kill()


def test_requests_at_once_are_counted_over_all_workers(tmp_path: Path) -> None:
    workers = Workers(tmp_path, 2, AdmissionLimits(max_concurrent=2))
    permits = [workers.admit(0), workers.admit(1)]
    for worker in (0, 1):
        workers.refused(worker)
        workers.admit(worker, "bob").close(None)
    permits[0].close(10)
    workers.admit(1)
    workers.refused(0)


def test_a_minutes_allowance_is_one_for_all_workers(tmp_path: Path) -> None:
    workers = Workers(tmp_path, 2, AdmissionLimits(requests_per_minute=4, tokens_per_minute=1000))
    for worker in (0, 1, 1, 0):
        workers.admit(worker).close(10)
    for worker in (0, 1):
        error = workers.refused(worker)
        assert error.headers["retry-after"] == "15"
        assert error.headers["x-ratelimit-remaining-requests"] == "0"
    workers.clock.now += 15
    workers.admit(1).close(10)
    workers.refused(0)
    workers.admit(0, "bob")


def test_tokens_that_were_not_used_are_given_back_to_all_workers(tmp_path: Path) -> None:
    workers = Workers(tmp_path, 2, AdmissionLimits(tokens_per_minute=1000))
    permit = workers.admit(0, tokens=900)
    workers.refused(1, tokens=500)
    permit.close(100)
    assert workers.admit(1, tokens=500).headers["x-ratelimit-remaining-tokens"] == "400"


def test_a_worker_that_was_idle_for_long_knows_when_others_used_their_allowance(tmp_path: Path) -> None:
    """What was used a minute ago is available again, though this worker did not see it used."""
    workers = Workers(tmp_path, 2, AdmissionLimits(requests_per_minute=2))
    for _ in range(2):
        workers.admit(0).close(10)
    workers.clock.now += 60
    for _ in range(2):
        workers.admit(1).close(10)
    workers.refused(0)


def test_the_queue_is_as_long_as_all_workers_can_work_on_and_what_may_wait(tmp_path: Path) -> None:
    workers = Workers(tmp_path, 2, AdmissionLimits(max_queued_requests=3))
    permits = [workers.admit(i % 2, f"client-{i}") for i in range(7)]  # twice two at once, and three that wait
    for worker in (0, 1):
        workers.refused(worker, "late")
    permits[0].close(10)
    workers.admit(1, "late")


def test_a_refused_request_reserves_nothing(tmp_path: Path) -> None:
    workers = Workers(tmp_path, 2, AdmissionLimits(max_concurrent=1))
    permit = workers.admit(0)
    for _ in range(100):
        workers.refused(1)
    permit.close(10)
    assert workers.tables[0].in_flight() == workers.tables[1].in_flight() == (0, 0)
    workers.admit(1)


def test_a_killed_workers_requests_count_no_longer_and_its_clients_allowances_stay(
    tmp_path: Path, dead_worker: subprocess.Popen[str]
) -> None:
    own = UsageTable(tmp_path, 4)
    reservation = own.claim(own.reserve("alice", 1), 10)
    own.refresh()
    assert (own.num_workers, own.in_flight()) == (2, (4, 310))
    assert own.usage(reservation).num_requests == 2
    dead_worker.kill()
    dead_worker.wait()
    own.refresh()
    assert (own.num_workers, own.in_flight()) == (1, (1, 10))
    usage = own.usage(reservation)
    assert (usage.num_requests, usage.num_answers, usage.num_tokens) == (1, 1, 10)
    assert (usage.requests_left, usage.tokens_left, usage.at) == (1.0, 5.0, 1000.0)


def test_the_successor_of_a_killed_worker_has_nothing_in_flight(
    tmp_path: Path, dead_worker: subprocess.Popen[str]
) -> None:
    dead_worker.kill()
    dead_worker.wait()
    successor = UsageTable(tmp_path, 4)  # the first free page is the dead one's
    reservation = successor.claim(successor.reserve("alice", 1), 10)
    assert successor.in_flight() == (1, 10)
    assert successor.usage(reservation).num_requests == 1
    assert successor.usage(reservation).tokens_left == 5.0


def test_more_workers_than_pages_are_refused(tmp_path: Path) -> None:
    taken = [UsageTable(tmp_path, 2) for _ in range(2)]
    assert [own.num_workers for own in taken] == [1, 2]
    with pytest.raises(RuntimeError, match="more than 2 workers"):
        UsageTable(tmp_path, 2).refresh()


def test_more_clients_than_entries_are_admitted_and_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client without an entry has no limits of its own; an entry is kept while its client has requests in flight."""
    monkeypatch.setattr(client_usage, "NUM_ENTRIES", 4)
    workers = Workers(tmp_path, 2, AdmissionLimits(10_000, 10_000_000, requests_per_minute=3, max_concurrent=1))
    permits = {i: workers.admit(i % 2, f"client-{i}") for i in range(300)}
    assert workers.tables[0].in_flight() == (300, 3000)
    refused = 0
    for i in range(300):
        try:
            workers.admit(i % 2, f"client-{i}").close(None)
        except APIError:
            refused += 1
    assert 4 <= refused < 300
    for permit in permits.values():
        permit.close(10)
    assert workers.tables[0].in_flight() == (0, 0)
    workers.clock.now += 60
    workers.admit(0, "somebody").close(10)
    assert workers.tables[1].in_flight() == (0, 0)
