"""Our randomness never changes, and permutations are bijections with random access."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_exact.data.shuffle import BLOCK, KeyedPermutation, derive_key, random_bits

KEYS = st.integers(0, 2**64 - 1)


def test_random_bits_is_the_published_splitmix64() -> None:
    # First outputs for seed 0 and seed 1234567 of the public-domain C code (prng.di.unimi.it).
    assert random_bits(0, np.arange(3)).tolist() == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]
    assert random_bits(1234567, np.arange(3)).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_random_bits_leaves_its_argument_alone() -> None:
    counter = np.arange(4, dtype=np.uint64)
    random_bits(1, counter)
    assert counter.tolist() == [0, 1, 2, 3]


def test_keys_are_frozen_and_told_apart() -> None:
    assert derive_key("row order", 1, 0) == 4905080240949082621
    keys = {derive_key(*parts) for parts in (("a", 1), ("a", "1"), ("a1",), ("a", 1, 0), ("a", 10))}
    assert len(keys) == 5


def test_permutations_are_frozen() -> None:
    assert KeyedPermutation(10, 1).all().tolist() == [2, 5, 8, 7, 3, 9, 1, 6, 0, 4]
    assert KeyedPermutation(1_000_003, 7).take([0, 1, 1_000_002]).tolist() == [183710, 743013, 584756]
    assert [KeyedPermutation(1 << 62, 5)[index] for index in (0, 1 << 61)] == [
        1852513748717375651,
        4596110609911378384,
    ]
    assert KeyedPermutation(1 << 32, 9).take([0, 1, (1 << 32) - 1]).tolist() == [
        3176974246,
        2317228122,
        89108782,
    ]


@settings(deadline=None, max_examples=60)
@given(size=st.integers(0, 3000), key=KEYS)
def test_permutation_is_a_bijection(size: int, key: int) -> None:
    assert sorted(KeyedPermutation(size, key).all().tolist()) == list(range(size))


@settings(deadline=None, max_examples=30)
@given(size=st.integers(1, 1 << 62), key=KEYS, data=st.data())
def test_one_many_and_all_agree(size: int, key: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20))
    permutation = KeyedPermutation(size, key)
    assert permutation.take(positions).tolist() == [permutation[position] for position in positions]
    assert all(0 <= permutation[position] < size for position in positions)


def test_blocks_join() -> None:
    size = 2 * BLOCK + 7
    permutation = KeyedPermutation(size, 3)
    whole = permutation.all()
    assert np.array_equal(np.sort(whole), np.arange(size))
    positions = np.array([0, BLOCK - 1, BLOCK, size - 1])
    assert whole[positions].tolist() == [permutation[int(position)] for position in positions]
    assert np.array_equal(permutation.take(np.arange(size)), whole)
    assert np.array_equal(permutation.part(BLOCK - 3, size - 1), whole[BLOCK - 3 : size - 1])
    assert np.array_equal(np.concatenate(list(permutation.blocks(1000))), whole)


@pytest.mark.parametrize(("size", "orders", "limit"), [(4, 24, 60), (5, 120, 186)])
def test_every_order_of_few_elements_is_about_equally_likely(size: int, orders: int, limit: int) -> None:
    draws = 40 * orders
    permutations = (KeyedPermutation(size, derive_key("test", key)) for key in range(draws))
    seen = Counter(tuple(permutation.all().tolist()) for permutation in permutations)
    expected = draws / orders
    chi_square = sum((count - expected) ** 2 / expected for count in seen.values())
    assert len(seen) == orders
    assert chi_square < limit  # orders - 1 degrees of freedom: exceeded about once in 10,000 and rarer


def test_order_has_no_trend() -> None:
    order = KeyedPermutation(20_000, 11).all()
    index = np.arange(order.size)
    assert abs(np.corrcoef(index, order)[0, 1]) < 0.03
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    other = KeyedPermutation(20_000, 12).all()
    assert abs(np.corrcoef(order, other)[0, 1]) < 0.03


def test_positions_and_sizes_out_of_range() -> None:
    with pytest.raises(IndexError, match="not in"):
        KeyedPermutation(3, 0)[3]
    with pytest.raises(ValueError, match="2\\^62"):
        KeyedPermutation((1 << 62) + 1, 0)
