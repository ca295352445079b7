"""Dataclasses that cost nothing until one is made.

The standard library looks at every field and compiles six methods of each frozen dataclass when its module is loaded: a
fifth of the time of a small report. Here the fields are only noted. `__init__` is compiled when a class has made some
instances, as most make few; all classes share the other methods. Everything of `dataclasses` (fields, replace, asdict)
works on them: the standard library makes what those look at when it is asked for. Checkers take the decorator for the
standard one.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from dataclasses import MISSING, Field, FrozenInstanceError
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable
    from dataclasses import dataclass as dataclass  # noqa: PLC0414 (re-exported)
else:

    def dataclass(cls=None, /, *, frozen=False, eq=True, **others):
        """Make a class a dataclass, as dataclasses.dataclass does; what is asked for otherwise, that one makes."""
        if others:
            return dataclasses.dataclass(cls, frozen=frozen, eq=eq, **others)
        return _made(cls, frozen, eq) if cls is not None else lambda cls: _made(cls, frozen, eq)


FEW = 12  # instances of a class: compiling its `__init__` takes as long as it saves in some more
_FIELDS, _PARAMS, _MATCH = "__dataclass_fields__", "__dataclass_params__", "__match_args__"


class _One(NamedTuple):
    """What is noted of a field."""

    name: str
    type: Any
    init: bool = True
    default: Any = MISSING
    factory: Any = MISSING
    shown: bool = True
    compared: bool = True


def _made(cls: type[Any], frozen: bool, eq: bool) -> type[Any]:
    own = cls.__dict__
    inherited = [found for base in cls.__mro__[1:] if (found := base.__dict__.get(_FIELDS)) is not None]
    if not all(isinstance(found, _Late) for found in inherited):
        return dataclasses.dataclass(cls, frozen=frozen, eq=eq)
    if not own.get("__doc__"):
        cls.__doc__ = f"{cls.__name__}(...)"  # the standard one would look at the signature
    init, has_hash = "__init__" in own, own.get("__hash__") is not None
    late = _Late(cls, frozen, inherited[0] if inherited else None)
    for name in (_FIELDS, _PARAMS, _MATCH):
        setattr(cls, name, late if name == _FIELDS else _Part(late, name))
    methods: dict[str, Any] = {"__repr__": _repr, "__replace__": _replace}
    if not init:
        methods |= {"__init__": _late_init(cls, late), "__signature__": _Signature()}
    if frozen:
        methods |= {"__setattr__": _refuse_set, "__delattr__": _refuse_delete}
    if eq:
        methods["__eq__"] = _equal
        if not has_hash:
            methods["__hash__"] = _hash if frozen else None
    for name, method in methods.items():
        if name not in own or (name == "__hash__" and own[name] is None):
            setattr(cls, name, method)
    return cls


class _Late:
    """The fields of a class: noted at once, and as `dataclasses` has them when somebody asks for those.

    Parameters
    ----------
    cls : the class; of its attributes that say something of a field only the default stays
    base : the fields of the dataclass that it is derived from, if it is
    """

    def __init__(self, cls: type[Any], frozen: bool, base: _Late | None) -> None:
        self._cls, self._frozen, self._base = cls, frozen, base
        self._own: dict[str, Any] = {}  # name -> its Field or default, MISSING for none
        for name in cls.__annotations__:
            value = cls.__dict__.get(name, MISSING)
            self._own[name] = value
            if not isinstance(value, Field):
                continue
            if value.default is MISSING:
                delattr(cls, name)
            else:
                setattr(cls, name, value.default)

    def __get__(self, instance: object, owner: type[Any]) -> dict[str, Field[Any]]:
        found: dict[str, Field[Any]] = self.part(_FIELDS)
        return found

    def part(self, name: str) -> Any:
        """Return what `dataclasses` keeps under a name, with the bases'."""
        if name == _MATCH:
            return tuple(one.name for one in self.noted if one.init)
        mine = getattr(self._twin, name)
        return {**self._base.part(_FIELDS), **mine} if name == _FIELDS and self._base else mine

    @functools.cached_property
    def noted(self) -> tuple[_One, ...]:
        """The fields in order, the bases' first."""
        found = {one.name: one for one in self._base.noted} if self._base else {}
        for name, value in self._own.items():
            kind = self._cls.__annotations__[name]
            if isinstance(kind, str) and kind.startswith(("ClassVar", "typing.ClassVar")):
                continue
            if isinstance(value, Field):
                compared = bool(value.compare)
                one = _One(name, kind, value.init, value.default, value.default_factory, value.repr, compared)
            else:
                one = _One(name, kind, default=value)
            found[name] = one
        return tuple(found.values())

    @functools.cached_property
    def _twin(self) -> type[Any]:
        """A class with the same fields that the standard library has made a dataclass."""
        cls = self._cls
        names = {name: value for name, value in self._own.items() if value is not MISSING}
        names |= {"__annotations__": dict(cls.__annotations__), "__module__": cls.__module__}
        twin: type[Any] = dataclasses.dataclass(init=False, repr=False, eq=False, frozen=self._frozen)(
            type(cls.__name__, (), names | {"__doc__": cls.__doc__})
        )
        return twin


class _Part:
    """Something else that `dataclasses` keeps of a class."""

    def __init__(self, late: _Late, name: str) -> None:
        self._late, self._name = late, name

    def __get__(self, instance: object, owner: type[Any]) -> Any:
        return self._late.part(self._name)


def _noted(cls: type[Any]) -> tuple[_One, ...]:
    """Return the fields of one of our classes, or of one derived from it."""
    late = next(found for base in cls.__mro__ if isinstance(found := base.__dict__.get(_FIELDS), _Late))
    return late.noted


def _late_init(cls: type[Any], late: _Late) -> Callable[..., None]:
    """Return an `__init__` that makes a few instances, then the real one, which takes its place."""
    made_so_far = 0

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        nonlocal made_so_far
        made_so_far += 1
        if made_so_far <= FEW and _fill(self.__dict__, late.noted, args, kwargs):
            if hasattr(cls, "__post_init__"):
                self.__post_init__()
            return
        made = _init_of(cls, late.noted)  # which also says what is wrong with the arguments
        cls.__init__ = made
        made(self, *args, **kwargs)

    __init__.__qualname__ = f"{cls.__qualname__}.__init__"
    return __init__


def _fill(own: dict[str, Any], noted: tuple[_One, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Put the attributes into an instance's dictionary in their order; False if the arguments are not right."""
    given = dict(zip((one.name for one in noted if one.init), args, strict=False))
    given.update(kwargs)
    if len(given) != len(args) + len(kwargs):
        return False
    values: dict[str, Any] = {}
    for one in noted:
        if one.init and one.name in given:
            values[one.name] = given.pop(one.name)
        elif one.factory is not MISSING:
            values[one.name] = one.factory()
        elif one.init and one.default is not MISSING:
            values[one.name] = one.default
        elif one.init:
            return False
    if given:
        return False
    own.update(values)
    return True


def _init_of(cls: type[Any], noted: tuple[_One, ...]) -> Callable[..., None]:
    """Compile `__init__`: attributes go into the instance's dictionary, frozen or not."""
    names: dict[str, Any] = {"_missing": MISSING}
    parameters, lines = [], ["_own_ = self.__dict__"]
    for one in noted:
        factory, default = one.factory is not MISSING, one.default is not MISSING
        if factory:
            names[f"_make_{one.name}"] = one.factory
        if default:
            names[f"_default_{one.name}"] = one.default
        if one.init:
            text = f"=_default_{one.name}" if default else "=_missing" if factory else ""
            parameters.append(one.name + text)
            value = f"_make_{one.name}() if {one.name} is _missing else {one.name}" if factory else one.name
            lines.append(f"_own_[{one.name!r}] = {value}")
        elif factory:
            lines.append(f"_own_[{one.name!r}] = _make_{one.name}()")
    if hasattr(cls, "__post_init__"):
        lines.append("self.__post_init__()")
    source = f"def __init__({', '.join(['self', *parameters])}):\n " + "\n ".join(lines)
    exec(source, names)  # noqa: S102 (of the names of our own fields)
    made: Callable[..., None] = names["__init__"]
    made.__qualname__ = f"{cls.__qualname__}.__init__"
    made.__annotations__ = {one.name: one.type for one in noted if one.init} | {"return": None}
    return made


class _Signature:
    """What `inspect.signature` asks a class for."""

    def __get__(self, instance: object, owner: type[Any]) -> Any:
        import inspect

        whole = inspect.signature(_init_of(owner, _noted(owner)))
        return whole.replace(parameters=list(whole.parameters.values())[1:])


@functools.cache
def _values_of(cls: Any) -> Callable[[Any], Any]:
    """Return what gives the fields that count of an instance, as a tuple."""
    names = [one.name for one in _noted(cls) if one.compared]
    if len(names) > 1:
        return operator.attrgetter(*names)
    return lambda value: tuple(getattr(value, name) for name in names)


def _repr(self: Any) -> str:
    shown = (f"{one.name}={getattr(self, one.name)!r}" for one in _noted(type(self)) if one.shown)
    return f"{type(self).__qualname__}({', '.join(shown)})"


def _replace(self: Any, /, **changes: Any) -> Any:
    return dataclasses.replace(self, **changes)


def _equal(self: Any, other: object) -> Any:
    if other.__class__ is not self.__class__:
        return NotImplemented
    cls: Any = type(self)
    of = _values_of(cls)
    return of(self) == of(other)


def _hash(self: Any) -> int:
    cls: Any = type(self)
    return hash(_values_of(cls)(self))


def _refuse_set(self: Any, name: str, value: object) -> None:  # noqa: ARG001
    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_delete(self: Any, name: str) -> None:  # noqa: ARG001
    raise FrozenInstanceError(f"cannot delete field {name!r}")
