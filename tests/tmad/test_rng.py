"""Keyed randomness: the same everywhere, different for different keys."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tmad.rng import numpy_generator, seed_of, torch_generator

ROOT = Path(__file__).resolve().parents[2]
PARTS = st.lists(st.integers(-(2**40), 2**40) | st.text(max_size=5), max_size=4)


def test_the_seed_of_a_key_is_a_known_number_on_every_machine() -> None:
    assert seed_of(0, "mask", "sea/01.jpg", 3) == 5491946768372927827


def test_another_process_with_another_hash_salt_gives_the_same_seed() -> None:
    program = "from tmad.rng import seed_of; print(seed_of(7, 'sample', 'a', 2), hash('a'))"
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    seed, salted = done.stdout.split()
    assert int(seed) == seed_of(7, "sample", "a", 2)
    assert int(salted) != hash("a")


@given(PARTS, PARTS)
def test_two_keys_give_the_same_seed_only_if_they_are_equal(a: list, b: list) -> None:
    assert (seed_of(*a) == seed_of(*b)) == (a == b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((0, 1), (1, 0)),
        (("a", "b"), ("ab",)),
        (("a", ""), ("a",)),
        ((1,), ("1",)),
        (("a", "bc"), ("ab", "c")),
        ((), ("",)),
    ],
)
def test_order_cuts_and_types_of_a_key_count(a: tuple, b: tuple) -> None:
    assert seed_of(*a) != seed_of(*b)


@given(PARTS)
def test_a_seed_has_63_bits(key: list) -> None:
    assert 0 <= seed_of(*key) < 2**63


def test_seeds_of_neighbouring_keys_use_the_whole_range() -> None:
    seeds = np.array([seed_of(0, "sample", str(i), 0) for i in range(400)], dtype=np.float64) / 2**63
    assert abs(seeds.mean() - 0.5) < 0.08
    assert np.ptp(seeds) > 0.95


@pytest.mark.parametrize("part", [True, 1.0, None, b"a", np.int64(3)])
def test_a_part_that_is_neither_int_nor_str_is_refused_by_its_type(part: object) -> None:
    with pytest.raises(TypeError, match=type(part).__name__):
        seed_of(0, part)  # type: ignore[arg-type]


def test_generators_repeat_by_key_and_differ_between_keys() -> None:
    assert numpy_generator(1, "a").random(5).tolist() == numpy_generator(1, "a").random(5).tolist()
    assert numpy_generator(1, "a").random(5).tolist() != numpy_generator(1, "b").random(5).tolist()
    draws = [torch.rand(5, generator=torch_generator(*key)) for key in ((1, "a"), (1, "a"), (1, "b"))]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_making_generators_leaves_the_global_ones_alone() -> None:
    np.random.seed(3)
    torch.manual_seed(3)
    expected = np.random.random(), torch.rand(())
    np.random.seed(3)
    torch.manual_seed(3)
    numpy_generator(1).random(), torch.rand(2, generator=torch_generator(1))
    assert (np.random.random(), torch.rand(())) == expected
