"""Dataclasses that cost nothing until one is made.

The standard library compiles six methods of every frozen dataclass when its module is loaded: a fifth of the time of a
small report. Here `__init__` is compiled when the first instance is made, and all classes share the other methods.
Everything of `dataclasses` (fields, replace, asdict) works on them; checkers take the decorator for the standard one.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from dataclasses import MISSING, FrozenInstanceError
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from dataclasses import dataclass as dataclass  # noqa: PLC0414 (re-exported)
else:

    def dataclass(cls=None, /, *, frozen=False, eq=True, **others):
        """Make a class a dataclass, as dataclasses.dataclass does; what is asked for otherwise, that one makes."""
        if others:
            return dataclasses.dataclass(cls, frozen=frozen, eq=eq, **others)
        return _made(cls, frozen, eq) if cls is not None else lambda cls: _made(cls, frozen, eq)


def _made(cls: type[Any], frozen: bool, eq: bool) -> type[Any]:
    own = cls.__dict__
    if not own.get("__doc__"):
        cls.__doc__ = f"{cls.__name__}(...)"  # the standard one would look at the signature
    init, has_hash = "__init__" in own, own.get("__hash__") is not None
    dataclasses.dataclass(cls, init=False, repr=False, eq=False)
    methods: dict[str, Any] = {"__repr__": _repr}
    if not init:
        methods |= {"__init__": _late_init(cls), "__signature__": _Signature()}
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


def _late_init(cls: type[Any]) -> Callable[..., None]:
    """Return an `__init__` that makes the real one and takes its place."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        made = _init_of(cls)
        cls.__init__ = made
        made(self, *args, **kwargs)

    __init__.__qualname__ = f"{cls.__qualname__}.__init__"
    return __init__


def _init_of(cls: type[Any]) -> Callable[..., None]:
    """Compile `__init__`: attributes go into the instance's dictionary, frozen or not."""
    names: dict[str, Any] = {"_missing": MISSING}
    parameters, lines = [], ["_own_ = self.__dict__"]
    for one in dataclasses.fields(cls):
        factory, default = one.default_factory is not MISSING, one.default is not MISSING
        if factory:
            names[f"_make_{one.name}"] = one.default_factory
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
    made.__annotations__ = {one.name: one.type for one in dataclasses.fields(cls) if one.init} | {"return": None}
    return made


class _Signature:
    """What `inspect.signature` asks a class for."""

    def __get__(self, instance: object, owner: type[Any]) -> Any:
        import inspect

        whole = inspect.signature(_init_of(owner))
        return whole.replace(parameters=list(whole.parameters.values())[1:])


@functools.cache
def _values_of(cls: Any) -> Callable[[Any], Any]:
    """Return what gives the fields that count of an instance, as a tuple."""
    names = [one.name for one in dataclasses.fields(cls) if one.compare]
    if len(names) > 1:
        return operator.attrgetter(*names)
    return lambda value: tuple(getattr(value, name) for name in names)


def _repr(self: Any) -> str:
    shown = (f"{one.name}={getattr(self, one.name)!r}" for one in dataclasses.fields(self) if one.repr)
    return f"{type(self).__qualname__}({', '.join(shown)})"


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
