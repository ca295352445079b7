"""The report document as JSON and back: `from_json(to_json(x)) == x`.

Both sides follow the types of the dataclasses; a member whose JSON name differs says so in its field's metadata
("from" is no name in Python). Members that this version does not know are passed over: newer ones may add some.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from kvmtrace.errors import FormatError
from kvmtrace.report.document import Report

if TYPE_CHECKING:
    from collections.abc import Mapping

T = TypeVar("T")
_WORDS = {int: "an integer", float: "a number", str: "a text", bool: "true or false", type(None): "null"}


@functools.cache
def members(kind: type) -> tuple[tuple[str, str, Any], ...]:
    """Return (name, JSON name, type) of each member of a dataclass."""
    hints = get_type_hints(kind)
    fields = dataclasses.fields(kind)  # type: ignore[arg-type,unused-ignore]
    return tuple((item.name, item.metadata.get("json", item.name), hints[item.name]) for item in fields)


def dump(value: Any) -> Any:
    """Return a document or a part of it as what JSON knows: dicts, lists, strings, numbers, null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {named: dump(getattr(value, name)) for name, named, _ in members(type(value))}
    if isinstance(value, dict):
        return {str(key): dump(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [dump(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return value.item() if hasattr(value, "item") else str(value)  # a NumPy scalar


def to_json(report: Report, *, only: tuple[str, ...] = ()) -> str:
    """Return the document as JSON, `schema` first.

    Parameters
    ----------
    only : names of the members wanted; () for all
    """
    everything = dump(report)
    document = {"schema": everything.pop("schema")}
    document.update({name: value for name, value in everything.items() if not only or name in only})
    return json.dumps(document, indent=1, ensure_ascii=True, allow_nan=False)


def from_json(text: str | bytes, path: str = "report") -> Report:
    """Read a document that to_json wrote; the members left out by `only` are as in an empty report.

    Parameters
    ----------
    path : the file, for messages

    Raises
    ------
    FormatError
        It is no JSON, or no report document.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(path, None, "JSON", str(error)) from error
    return _Reader(path).read(Report, value, "")


class _Reader:
    """Reads JSON values as types say, and says where a value is none of them."""

    def __init__(self, path: str) -> None:
        self._path = path

    def read(self, kind: type[T], value: Any, where: str) -> T:
        made: T = self._value(kind, value, where)
        return made

    def _value(self, kind: Any, value: Any, where: str) -> Any:
        if kind in _WORDS:
            return self._leaf(kind, value, where)
        if dataclasses.is_dataclass(kind):
            return self._object(kind, self._mapping(value, where), where)
        origin, arguments = get_origin(kind), get_args(kind)
        if origin in {Union, types.UnionType}:
            return self._any_of(arguments, value, where)
        if origin is Literal:
            return value if value in arguments else self._refuse(" or ".join(map(repr, arguments)), value, where)
        if origin is tuple:
            return self._tuple(arguments, value, where)
        assert origin is dict, kind
        items = self._mapping(value, where).items()
        return {arguments[0](key): self._value(arguments[1], item, f"{where}.{key}") for key, item in items}

    def _leaf(self, kind: Any, value: Any, where: str) -> Any:
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return value  # a mean of 3 is written "3"
        if type(value) is not kind:
            self._refuse(_WORDS[kind], value, where)
        return value

    def _any_of(self, kinds: tuple[Any, ...], value: Any, where: str) -> Any:
        if value is None and type(None) in kinds:
            return None
        others = [kind for kind in kinds if kind is not type(None)]
        if len(others) == 1:
            return self._value(others[0], value, where)
        return value if type(value) in others else self._refuse(" or ".join(_WORDS[k] for k in others), value, where)

    def _object(self, kind: Any, value: Mapping[str, Any], where: str) -> Any:
        given = {
            name: self._value(hint, value[named], f"{where}.{named}".lstrip("."))
            for name, named, hint in members(kind)
            if named in value
        }
        try:
            return kind(**given)
        except TypeError:
            missing = [named for name, named, _ in members(kind) if name not in given]
            return self._refuse(f"an object with {', '.join(missing)}", dict(value), where)

    def _tuple(self, kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
        if not isinstance(value, list) or (kinds[-1] is not Ellipsis and len(value) != len(kinds)):
            self._refuse("a list" if kinds[-1] is Ellipsis else f"a list of {len(kinds)}", value, where)
        each = [kinds[0]] * len(value) if kinds[-1] is Ellipsis else list(kinds)
        return tuple(
            self._value(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(each, value, strict=True))
        )

    def _mapping(self, value: Any, where: str) -> Mapping[str, Any]:
        return value if isinstance(value, dict) else self._refuse("an object", value, where)

    def _refuse(self, expected: str, value: Any, where: str) -> Any:
        raise FormatError(self._path, None, f"{expected} at {where or 'the top'}", json.dumps(value)[:60])
