"""The exception tree: message, hint and a unique code per class."""

import pickle

import pytest

from skyloom.core import errors
from skyloom.core.errors import CapacityError, SkyloomError

TREE = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, SkyloomError)
]


def test_tree_in_the_module_docstring_is_complete():
    drawn = [line.split()[0] for line in (errors.__doc__ or "").splitlines() if "Error " in line]
    assert drawn == [kind.__name__ for kind in TREE]


def test_codes_are_unique():
    assert len({kind.code for kind in TREE}) == len(TREE)


@pytest.mark.parametrize("kind", TREE)
def test_the_hint_follows_the_message(kind: type[SkyloomError]):
    assert str(kind("It broke.", hint="Mend it.")) == "It broke. Mend it."
    assert str(kind("It broke.")) == "It broke."
    with pytest.raises(SkyloomError, match="It broke"):
        raise kind("It broke.")


@pytest.mark.parametrize("kind", TREE)
def test_errors_can_be_pickled(kind: type[SkyloomError]):
    error = pickle.loads(pickle.dumps(kind("It broke.", hint="Mend it.")))
    assert (type(error), error.message, error.hint) == (kind, "It broke.", "Mend it.")


def test_capacity_error_has_retry_after():
    assert CapacityError("Full.", retry_after=2.5).retry_after == 2.5
    assert CapacityError("Full.").retry_after is None
