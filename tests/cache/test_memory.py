import threading
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fragfs.cache.memory import MemoryFragmentCache
from fragfs.errors import UsageError


def view(size, fill=0):
    return memoryview(bytes([fill]) * size)


def test_returns_the_very_bytes_that_were_put():
    cache = MemoryFragmentCache(100)
    raw = view(10, 7)
    cache.put(1, raw)
    assert cache.get(1) is raw
    assert cache.get(2) is None


def test_least_recently_used_leaves_first():
    cache = MemoryFragmentCache(30)
    for number in (1, 2, 3):
        cache.put(number, view(10))
    cache.get(1)
    cache.put(4, view(10))
    assert [n for n in (1, 2, 3, 4) if cache.get(n) is not None] == [1, 3, 4]


def test_a_fragment_beyond_the_budget_evicts_nothing():
    cache = MemoryFragmentCache(30)
    cache.put(1, view(30))
    cache.put(2, view(31))
    assert cache.get(1) is not None
    assert cache.get(2) is None


def test_putting_again_counts_once():
    cache = MemoryFragmentCache(30)
    cache.put(1, view(20))
    cache.put(1, view(20))
    assert cache.statistics().bytes_held == 20
    assert cache.statistics().evictions == 0


def test_a_view_outlives_its_eviction():
    cache = MemoryFragmentCache(10)
    cache.put(1, view(10, 5))
    held = cache.get(1)
    cache.put(2, view(10, 6))
    assert cache.get(1) is None
    assert bytes(held) == bytes([5]) * 10


def test_statistics_count():
    cache = MemoryFragmentCache(10)
    cache.get(1)
    cache.put(1, view(10))
    cache.get(1)
    cache.put(2, view(4))
    statistics = cache.statistics()
    assert (statistics.hits, statistics.misses, statistics.evictions) == (1, 1, 1)
    assert (statistics.bytes_held, statistics.bytes_max, statistics.fragment_count) == (4, 10, 1)


def test_a_negative_budget_is_refused():
    with pytest.raises(UsageError):
        MemoryFragmentCache(-1)


@given(
    st.integers(0, 60),
    st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 40)), max_size=60),
)
def test_equals_a_list_kept_in_order_of_use(budget, steps):
    cache, model = MemoryFragmentCache(budget), []  # model: (number, size), least recent first
    for is_put, number, size in steps:
        present = [entry for entry in model if entry[0] == number]
        if is_put:
            cache.put(number, view(size))
            if size <= budget:
                model = [e for e in model if e[0] != number] + [(number, size)]
                while sum(s for _, s in model) > budget:
                    model.pop(0)
        else:
            found = cache.get(number)
            assert (None if found is None else found.nbytes) == (present[0][1] if present else None)
            if present:
                model = [e for e in model if e[0] != number] + present
    assert cache.statistics().bytes_held == sum(s for _, s in model) <= budget


def test_many_threads_stay_within_the_budget_and_see_whole_fragments():
    cache = MemoryFragmentCache(5000)
    failures = []

    def work(seed):
        random = Random(seed)
        for _ in range(3000):
            number = random.randrange(40)
            found = cache.get(number)
            if found is None:
                cache.put(number, view(number * 10 + 1, number))
            elif found.nbytes != number * 10 + 1 or found[0] != number:
                failures.append(number)
            if cache.statistics().bytes_held > 5000:
                failures.append("budget")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
