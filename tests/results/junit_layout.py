"""The part of JUnit XML that both Maven Surefire and Jenkins' xUnit plugin accept, as a table, and a check against it.

Source: maven-surefire, surefire-test-report.xsd; xunit-plugin, junit-10.xsd. The stricter one stands.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from collections.abc import Iterator

TIME = re.compile(r"(([0-9]{0,3},)*[0-9]{3}|[0-9]{0,3})*(\.[0-9]{0,3})?")
# element -> attributes that it must have, that it may have, its children in their order with how many there may be
LAYOUT: dict[str, tuple[set[str], set[str], tuple[tuple[str, int], ...]]] = {
    "testsuite": (
        {"name", "tests", "errors", "skipped", "failures"},
        {"time", "group"},
        (("properties", 1000), ("testcase", 10**6)),
    ),
    "testcase": (
        {"name", "time"},
        {"classname", "group"},
        (("failure", 10**6), ("skipped", 1), ("error", 1), ("system-out", 1), ("system-err", 1)),
    ),
    "failure": ({"type"}, {"message"}, ()),
    "error": ({"type"}, {"message"}, ()),
    "skipped": (set(), {"message"}, ()),
    "system-out": (set(), set(), ()),
    "system-err": (set(), set(), ()),
    "properties": (set(), set(), (("property", 10**6),)),
    "property": ({"name", "value"}, set(), ()),
}


def problems(text: str) -> list[str]:
    """Return what in a document the schemas would refuse."""
    root = ET.fromstring(text)
    found = [] if root.tag == "testsuite" else [f"root {root.tag}"]
    return found + list(_of(root)) + list(_counts(root))


def _of(element: ET.Element) -> Iterator[str]:
    if element.tag not in LAYOUT:
        yield f"unknown element {element.tag}"
        return
    must, may, children = LAYOUT[element.tag]
    given = set(element.attrib)
    yield from (f"{element.tag} without {name}" for name in must - given)
    yield from (f"{element.tag} with {name}" for name in given - must - may)
    if "time" in given and not TIME.fullmatch(element.attrib["time"]):
        yield f"time {element.attrib['time']}"
    if children and (element.text or "").strip():
        yield f"text in {element.tag}"
    order = [name for name, _ in children]
    tags = [child.tag for child in element]
    yield from (f"{tag} in {element.tag}" for tag in set(tags) - set(order))
    places = [order.index(tag) for tag in tags if tag in order]
    if places != sorted(places):
        yield f"order in {element.tag}: {tags}"
    yield from (f"{tags.count(name)} {name}" for name, most in children if tags.count(name) > most)
    for child in element:
        yield from _of(child)


def _counts(root: ET.Element) -> Iterator[str]:
    """Compare the numbers of the suite with its cases: no schema does, and readers add them up."""
    cases = root.findall("testcase")
    failed = [case for case in cases if case.find("failure") is not None]
    errors = [case for case in cases if case.find("failure") is None and case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    for name, number in (
        ("tests", len(cases)),
        ("failures", len(failed)),
        ("errors", len(errors)),
        ("skipped", len(skipped)),
    ):
        if root.attrib.get(name) != str(number):
            yield f"{name}={root.attrib.get(name)}, counted {number}"
