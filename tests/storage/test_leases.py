"""Promises of leases: every caller gets its own incarnation, and the older one is fenced."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from processes import start

from dask_isgd.errors import LeaseLostError, RunNotFoundError
from dask_isgd.storage import Leases


def test_one_after_the_other(home):
    leases = Leases(home.folder / "leases")
    assert leases.highest() == 0
    assert [leases.acquire({"host": host}).incarnation for host in "abc"] == [1, 2, 3]
    assert leases.highest() == 3
    assert leases.owner(2) == {"host": "b"}
    assert leases.folder.names()[0] == "learner-0001.json"
    leases.lease(3).check()
    with pytest.raises(LeaseLostError, match="incarnation 2 is fenced: incarnation 3"):
        leases.lease(2).check()
    with pytest.raises(KeyError, match="never acquired"):
        leases.owner(4)


def test_roles_are_apart(home):
    assert [
        Leases(home.url, role, storage_options=home.options).acquire({}).incarnation
        for role in ("learner", "coordinator", "learner")
    ] == [1, 1, 2]
    with pytest.raises(ValueError, match="role"):
        Leases(home.folder, "../x")


def test_beyond_four_digits(home):
    home.folder.replace("learner-9999.json", b"{}")
    leases = Leases(home.folder)
    assert [leases.acquire({}).incarnation, leases.acquire({}).incarnation, leases.highest()] == [10000, 10001, 10001]


@pytest.mark.parametrize("body", [b"", b"{", b"[]"])
def test_a_broken_body_counts_all_the_same(home, body):
    home.folder.replace("learner-0001.json", body)
    leases = Leases(home.folder)
    assert (leases.owner(1), leases.highest(), leases.acquire({}).incarnation) == ({}, 1, 2)


def test_foreign_files_do_not_count(home):
    for name in ("learner-0009.json.bak", ".learner-0009.json.abc.partial", "learner-x.json", "coordinator-0007.json"):
        home.folder.replace(name, b"")
    assert Leases(home.folder).highest() == 0


def test_threads_at_once(home):
    together, times = threading.Barrier(8), 20 if home.folder.local else 4

    def take(i):
        together.wait(10)
        return [Leases(home.url, storage_options=home.options).acquire({"thread": i}).incarnation for _ in range(times)]

    with ThreadPoolExecutor(8) as pool:
        taken = [one for each in pool.map(take, range(8)) for one in each]
    assert sorted(taken) == list(range(1, 8 * times + 1))


TAKER = """
import json, sys
from dask_isgd.storage import Leases
leases = Leases(sys.argv[1])
print(json.dumps([leases.acquire({"taker": sys.argv[2]}).incarnation for _ in range(100)]))
"""


def test_processes_at_once(tmp_path):
    takers = [start(TAKER, tmp_path, name) for name in "abc"]
    taken = [json.loads(taker.communicate(timeout=60)[0].splitlines()[-1]) for taker in takers]
    assert sorted(i for each in taken for i in each) == list(range(1, 301))
    assert {Leases(tmp_path).owner(i)["taker"] for i in taken[1]} == {"b"}


def test_a_successor_waits_for_a_holder_that_leaves_in_order_and_for_no_other(home):
    leases = Leases(home.folder)
    leases.await_leaving(60)  # nobody yet
    first = leases.acquire({})
    leases.await_leaving(60)  # it may live or be dead, but it does not leave
    with ThreadPoolExecutor(1) as pool:
        with first.leaving():
            waiting = pool.submit(leases.await_leaving, 60)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.2)
            leases.await_leaving(0.1)  # not for ever
        waiting.result(timeout=60)
    assert leases.highest() == first.incarnation


def test_a_successor_does_not_wait_for_a_holder_that_was_killed_while_it_left(home):
    leases = Leases(home.folder)
    with ThreadPoolExecutor(1) as pool, leases.acquire({}).leaving() as sign:
        began = time.monotonic()
        leases.await_leaving(60, silence=0.3)
        assert 0.3 <= time.monotonic() - began < 30
        waiting = pool.submit(leases.await_leaving, 60, silence=3.0)
        for _ in range(10):
            sign()
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.3)
    waiting.result(timeout=60)


def test_the_next_incarnation_is_above_any_other_trace_of_the_run(home):
    assert Leases(home.folder).acquire({}, after=41).incarnation == 42
    assert Leases(home.folder).acquire({}, after=7).incarnation == 43


def test_a_lease_number_of_twenty_digits_is_a_foreign_file(home):
    home.folder.replace(f"learner-{10**19}.json", b"{}")
    assert Leases(home.folder).acquire({}).incarnation == 1


def test_a_deleted_run_is_named_by_the_one_who_held_it(home):
    leases = Leases(home.folder / "leases")
    lease = leases.acquire({})
    lease.check()
    home.folder.remove("leases")
    assert not lease.held()
    with pytest.raises(RunNotFoundError, match=r"the run directory .*run was deleted, moved or replaced"):
        lease.check()
    leases.lease(1).check()  # another host may not see the file yet
