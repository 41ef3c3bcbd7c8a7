"""Errors cross process borders."""

from __future__ import annotations

import inspect
import pickle

import pytest

from pipeline import errors

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.TMADError)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_survives_pickling_with_its_details(kind):
    error = kind("too little, got 2; set it to 4", differences={"seed": (1, 2)})
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == "too little, got 2; set it to 4"
    assert copy.details == {"differences": {"seed": (1, 2)}}


def test_there_is_one_root():
    assert len(KINDS) > 5
    assert all(kind.__doc__ for kind in KINDS)
    assert issubclass(errors.TMADError, Exception)
