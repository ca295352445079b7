"""Our dataclasses are those of the standard library, only made later."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from dataclasses import FrozenInstanceError, dataclass, field, fields, replace

import pytest

from kvmtrace.check.verdict import RuleResult
from kvmtrace.lazy_dataclass import dataclass as lazy


def make(kind, *, frozen, eq=True):
    """Make a class that uses what ours use."""

    @kind(frozen=frozen, eq=eq)
    class Base:
        name: str
        numbers: list[int] = field(default_factory=list)
        note: str = field(default="", compare=False, repr=False)

    @kind(frozen=frozen, eq=eq)
    class Point(Base):
        x: int = 3
        later: int = field(init=False, default=7)

        def __post_init__(self):
            self.__dict__["seen"] = (self.x, self.later)

    return Base, Point


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("number", [0, 1])
def test_it_does_what_the_standard_one_does(frozen, number):
    ours, theirs = make(lazy, frozen=frozen)[number], make(dataclass, frozen=frozen)[number]
    assert [(f.name, f.default) for f in fields(ours)] == [(f.name, f.default) for f in fields(theirs)]
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)
    for arguments in (("a",), ("a", [1]), ("a", [1], "why")):
        one, other = ours(*arguments), theirs(*arguments)
        assert repr(one) == repr(other)
        assert dataclasses.asdict(one) == dataclasses.asdict(other)
        assert one.__dict__ == other.__dict__
    assert ours("a") == ours("a", note="other")
    assert ours("a") != ours("b")
    assert ours("a") != theirs("a")
    assert replace(ours("a"), name="c").name == "c"
    assert ours("a").numbers is not ours("a").numbers
    assert copy.copy(ours("a", [2])) == ours("a", [2])
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'name'"):
        ours()
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        ours("a", colour=1)


def test_frozen_ones_are_frozen_and_have_a_hash():
    ours, theirs = (make(kind, frozen=True)[0] for kind in (lazy, dataclass))
    value = ours("a", ())
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'name'"):
        value.name = "b"
    with pytest.raises(FrozenInstanceError):
        del value.name
    assert hash(value) == hash(theirs("a", ()))
    with pytest.raises(TypeError, match="unhashable"):
        hash(make(lazy, frozen=False)[0]("a"))


def test_without_eq_they_are_told_apart():
    ours = make(lazy, frozen=True, eq=False)[0]
    value = ours("a")
    assert value == value
    assert value != ours("a")
    assert len({value, ours("a")}) == 2


def test_what_else_is_asked_for_the_standard_library_makes():
    @lazy(frozen=True, order=True)
    class Number:
        value: int

    assert Number(1) < Number(2)
    with pytest.raises(TypeError):

        @lazy(frozen=True, slots=3, unknown=1)
        class Wrong:
            value: int


def test_they_travel():
    value = RuleResult(3, 2, 1)
    assert pickle.loads(pickle.dumps(value)) == value
    assert RuleResult.__doc__.startswith("How often")
