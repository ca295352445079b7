"""I6 and V15's SMIs: the same in pieces, silent where VMs cannot be told apart, or where something was lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from check.test_checker import alarms, check

from kvmtrace.formats import open_recording

CASES = Path(__file__).parents[1] / "cases"
FOLLOWED = sorted(
    path.stem for pattern in ("pic-*.txt", "smi-*.txt", "smm-*.txt") for path in CASES.glob(pattern)
)  # fmt: skip
BROKEN = [
    name
    for name in FOLLOWED
    if {"# expect: I6", "# expect: V15"} & set((CASES / f"{name}.txt").read_text().split("\n"))
]


@pytest.mark.parametrize("name", FOLLOWED)
def test_pieces_give_the_same_answer(name: str) -> None:
    recording = open_recording(CASES / f"{name}.txt")
    table = recording.events()
    whole = followed(alarms(check(recording.capture, table)))
    for pieces in (1, 3, 8):
        assert followed(alarms(check(recording.capture, table, pieces))) == whole, pieces


@pytest.mark.parametrize("name", [name for name in BROKEN if name.startswith("pic-")])
def test_two_guests_that_program_pics_are_not_judged(name: str, tmp_path: Path) -> None:
    text = (CASES / f"{name}.txt").read_text()
    path = tmp_path / "two.txt"
    again = text.replace("vmm-100", "vmm-300").replace("vcpu_id=0", "vcpu_id=1")
    path.write_text(
        "".join(line + "\n" for pair in zip(text.splitlines(), again.splitlines(), strict=True) for line in pair)
    )
    found = check_text(path)
    assert [rule for rule in found if rule == "I6"] == []


# what one write does is known without knowing what was before
BY_A_WRITE = {"pic-end-of-another-pin", "pic-end-told-twice"}


@pytest.mark.parametrize("name", [name for name in BROKEN if name.startswith("pic-") and name not in BY_A_WRITE])
def test_userspace_that_sets_the_pics_is_not_judged(name: str, tmp_path: Path) -> None:
    lines = (CASES / f"{name}.txt").read_text().splitlines()
    last = max(i for i, line in enumerate(lines) if "pio_write at 0x21" in line or "pio_write at 0xa1" in line)
    moment = lines[last].split()[3]
    lines.insert(last + 3, f" vmm-200  [000] ..... {moment} sys_enter_ioctl: fd: 0x5, cmd: 0x8208ae63, arg: 0x0")
    path = tmp_path / "set.txt"
    path.write_text("\n".join(lines) + "\n")
    assert "I6" not in check_text(path)


@pytest.mark.parametrize("name", [name for name in BROKEN if name.startswith(("smi-", "smm-begins"))])
def test_a_vcpu_from_elsewhere_is_not_judged(name: str, tmp_path: Path) -> None:
    """What was made before the recording began may have been in the mode, or have had an SMI waiting."""
    text = (CASES / f"{name}.txt").read_text()
    path = tmp_path / "elsewhere.txt"
    kept = [line for line in text.splitlines() if "0xae01" not in line and "0xae41" not in line]
    path.write_text("\n".join(kept) + "\n")
    if name != "smi-without-effect":  # of which the mode's end told that the vCPU is outside
        assert check_text(path) == []


def followed(found: list[tuple[str, int, str, str]]) -> list[tuple[str, int, str, str]]:
    return [alarm for alarm in found if alarm[0] in ("I6", "V15")]


def check_text(path: Path) -> list[str]:
    recording = open_recording(path)
    return [alarm[0] for alarm in alarms(check(recording.capture, recording.events()))]
