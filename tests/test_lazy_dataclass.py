"""Our dataclasses are those of the standard library, only made later."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from dataclasses import FrozenInstanceError, dataclass, field, fields, replace

import pytest

from kvmtrace.check.verdict import RuleResult
from kvmtrace.lazy_dataclass import FEW
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


@pytest.mark.parametrize("frozen", [False, True])
def test_the_first_ones_are_like_the_later_ones(frozen):
    """Some are made without a compiled `__init__`: the same attributes in the same order, the same errors."""
    _, ours = make(lazy, frozen=frozen)
    _, theirs = make(dataclass, frozen=frozen)
    ways = [(("a",), {}), (("a", [1]), {"x": 5}), ((), {"x": 4, "name": "b"}), (("a", [], "c", 9), {})]
    for arguments, named in ways * FEW:
        assert list(vars(ours(*arguments, **named)).items()) == list(vars(theirs(*arguments, **named)).items())
    for arguments, named in (((), {}), (("a", [], "", 1, 2), {}), (("a",), {"name": "b"}), (("a",), {"later": 1})):
        raised = []
        for kind in (make(lazy, frozen=frozen)[1], theirs):
            with pytest.raises(TypeError) as error:
                kind(*arguments, **named)
            raised.append(str(error.value))
        assert raised[0] == raised[1]


def test_nothing_is_made_of_a_class_that_nobody_uses(monkeypatch):
    def refuse(*arguments, **named):
        raise AssertionError

    monkeypatch.setattr(dataclasses, "dataclass", refuse)
    monkeypatch.setattr("kvmtrace.lazy_dataclass._init_of", refuse)
    base, point = make(lazy, frozen=True)
    assert base.note == ""
    assert point.later == 7
    assert not hasattr(base, "numbers")
    assert point("a").x == 3
    monkeypatch.undo()
    assert [one.name for one in fields(point)] == ["name", "numbers", "note", "x", "later"]
    assert point.__match_args__ == ("name", "numbers", "note", "x")
    assert point.__dataclass_params__.frozen


def test_one_derived_from_a_standard_one_is_standard():
    @dataclass
    class Base:
        x: int = 1

    @lazy
    class Derived(Base):
        y: int = 2

    assert [(one.name, one.default) for one in fields(Derived)] == [("x", 1), ("y", 2)]
    assert repr(Derived(3)) == repr(Derived(3, 2))


def test_they_travel():
    value = RuleResult(3, 2, 1)
    assert pickle.loads(pickle.dumps(value)) == value
    assert RuleResult.__doc__.startswith("How often")
