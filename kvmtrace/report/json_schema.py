"""The JSON Schema of the report document, made from its types and the comments beside its members.

`report.schema.json` in this folder is what `write` made of them: the tests hold the two together.

    python -m kvmtrace.report.json_schema > kvmtrace/report/report.schema.json
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import json
import sys
import textwrap
import tokenize
import types
from importlib.resources import files
from typing import Any, Literal, Union, get_args, get_origin

from kvmtrace.report.document import SCHEMA, Report
from kvmtrace.report.json_document import members

FILE = "report.schema.json"
DIALECT = "https://json-schema.org/draft/2020-12/schema"
_LEAVES = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
# of the whole document; `check` prints these alone
ALWAYS = ("schema", "capture", "loss")


def shipped_schema() -> str:
    """Return the schema that is shipped with the package, as text."""
    return (files("kvmtrace.report") / FILE).read_text(encoding="utf-8")


def report_schema() -> dict[str, Any]:
    """Return the schema made from the types."""
    made: dict[str, dict[str, Any]] = {}
    _reference(Report, made)
    top = made.pop(Report.__name__)
    return {
        "$schema": DIALECT,
        "$id": "urn:" + SCHEMA.replace("/", ":"),
        "title": "The report document of kvmtrace",
        **top,
        "required": list(ALWAYS),
        "$defs": dict(sorted(made.items())),
    }


def write() -> str:
    """Return the schema as the text of its file."""
    return json.dumps(report_schema(), indent=1, ensure_ascii=False) + "\n"


def _reference(kind: type, made: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Describe a dataclass once, and return what refers to it."""
    if kind.__name__ not in made:
        made[kind.__name__] = {}
        words = _member_words(kind)
        properties = {}
        for name, named, hint in members(kind):
            described = _described(hint, made)
            properties[named] = {**described, "description": words[name]} if words.get(name) else described
        made[kind.__name__] = {
            "description": inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].replace("\n", " "),
            "type": "object",
            "properties": properties,
            "required": list(properties),
        }
    return {"$ref": f"#/$defs/{kind.__name__}"}


def _described(kind: Any, made: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the schema of a member's type."""
    if kind in _LEAVES:
        return {"type": _LEAVES[kind]}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _reference(kind, made)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return {"const": arguments[0]} if len(arguments) == 1 else {"enum": list(arguments)}
    if origin in {Union, types.UnionType}:
        parts = [_described(argument, made) for argument in arguments]
        plain = all(set(part) == {"type"} for part in parts)
        return {"type": [part["type"] for part in parts]} if plain else {"anyOf": parts}
    if origin is tuple:
        return _listed(arguments, made)
    assert origin is dict, kind
    keys = {"propertyNames": {"pattern": "^-?[0-9]+$"}} if arguments[0] is int else {}
    return {"type": "object", **keys, "additionalProperties": _described(arguments[1], made)}


def _listed(kinds: tuple[Any, ...], made: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the schema of a tuple: of any length, or of these members."""
    if kinds[-1] is Ellipsis:
        return {"type": "array", "items": _described(kinds[0], made)}
    each = [_described(kind, made) for kind in kinds]
    return {"type": "array", "prefixItems": each, "minItems": len(each), "maxItems": len(each)}


@functools.cache
def _member_words(kind: type) -> dict[str, str]:
    """Return member -> what is said of it: the comment behind it, or its line of the docstring's Parameters."""
    words = _parameters(inspect.cleandoc(kind.__doc__ or ""))
    source = textwrap.dedent(inspect.getsource(kind))
    comments = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and "noqa" not in token.string
    }
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    for statement in body.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            last = statement.end_lineno or statement.lineno
            if last in comments:
                words[statement.target.id] = comments[last]
    return words


def _parameters(docstring: str) -> dict[str, str]:
    """Return name -> description of a numpydoc section Parameters written as `name, name : words`."""
    words: dict[str, str] = {}
    names: list[str] = []
    section = docstring.partition("Parameters\n----------\n")[2].split("\n\n")[0]
    for line in section.splitlines():
        if line.startswith(" "):
            words.update({name: f"{words[name]} {line.strip()}" for name in names})
            continue
        names = [name.strip() for name in line.partition(" : ")[0].split(",")]
        words.update(dict.fromkeys(names, line.partition(" : ")[2].strip()))
    return words


if __name__ == "__main__":
    sys.stdout.write(write())
