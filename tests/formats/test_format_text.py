"""Format files: declarations to dtypes, and texts that are no format files."""

from __future__ import annotations

import numpy as np
import pytest
from writers.formats import HEADER_EVENT, KVM_EXIT, event_format, header_page

from kvmtrace.table.format_text import (
    DATA_LOC,
    REL_LOC,
    STATIC,
    TO_END,
    parse_event_format,
    parse_header_page,
    validate_header_event,
)


def field(declaration: str, size: int, signed: int = 0):
    parsed = parse_event_format(event_format("e", 1, [(declaration, 8, size, signed)]).decode(), "s")
    assert parsed is not None
    (only,) = parsed.fields.values()
    return only


@pytest.mark.parametrize(
    ("declaration", "size", "signed", "dtype"),
    [
        ("unsigned int vcpu_id", 4, 0, "<u4"),
        ("int prio", 4, 1, "<i4"),
        ("u64 info1", 8, 0, "<u8"),
        ("long ret", 8, 1, "<i8"),
        ("unsigned int fd", 8, 0, "<u8"),
        ("bool write", 1, 0, "?"),
        ("__u8 failed", 1, 0, "u1"),
        ("char comm[16]", 16, 0, "S16"),
        ("char * name", 8, 0, "<u8"),
        ("const char * name", 8, 0, "<u8"),
        ("enum zone_type zone", 4, 0, "<u4"),
        ("void *call_site", 8, 0, "<u8"),
    ],
)
def test_scalar_declarations(declaration, size, signed, dtype):
    got = field(declaration, size, signed)
    assert got.dtype == np.dtype(dtype)
    assert got.place == STATIC
    assert got.name == declaration.replace("*", " ").split("[")[0].split()[-1]


@pytest.mark.parametrize(
    ("declaration", "size", "base", "shape"),
    [
        ("__u8 insn[15]", 15, "u1", (15,)),
        ("unsigned long args[6]", 48, "<u8", (6,)),
        ("u32 regs[N]", 40, "<u4", (10,)),
        ("unsigned char mac[6]", 6, "u1", (6,)),
        ("struct in6_addr addr", 16, "u1", (16,)),
    ],
)
def test_arrays_and_structures(declaration, size, base, shape):
    assert field(declaration, size).dtype == np.dtype((base, shape))


def test_dynamic_arrays():
    assert field("__data_loc char[] name", 4).place == DATA_LOC
    assert field("__data_loc char[] name", 4).name == "name"
    assert field("__rel_loc char[] name", 4).place == REL_LOC
    assert field("__data_loc u64[] list", 4).dtype == np.dtype(object)
    assert field("char buf[]", 0).place == TO_END


def test_kvm_exit():
    parsed = parse_event_format(KVM_EXIT.decode(), "kvm")
    assert parsed is not None
    assert (parsed.name, parsed.event_id, parsed.system) == ("kvm_exit", 11, "kvm")
    assert list(parsed.common) == ["common_type", "common_flags", "common_preempt_count", "common_pid"]
    assert (parsed.fields["info1"].offset, parsed.fields["vcpu_id"].offset) == (32, 56)
    assert parsed.print_fmt == '""'


@pytest.mark.parametrize("text", ["", "name: x", "ID: 5\nname:", "\0\0", "name: x\nID: 99999999999\n"])
def test_other_texts_are_no_format(text):
    assert parse_event_format(text, "s") is None


def test_absurd_offsets_are_left_out():
    text = event_format("e", 1, [("int a", 999999999, 4, 0), ("int b", 8, 4, 0)]).decode()
    parsed = parse_event_format(text, "s")
    assert parsed is not None
    assert list(parsed.fields) == ["b"]


def test_header_page():
    layout = parse_header_page(header_page(8176).decode())
    assert layout is not None
    assert (layout.page_size, layout.data_offset, layout.commit_size) == (8192, 16, 8)
    assert parse_header_page("field: u64 timestamp; offset:0; size:8; signed:0;") is None


def test_header_event():
    text = HEADER_EVENT.decode()
    assert validate_header_event(text) is None
    assert validate_header_event(text.replace("5 bits", "4 bits")) == "type_len 4 bits, time_delta 27 bits"
    assert validate_header_event(text.replace("type == 29", "type == 28")) == "padding 28"


OLD_PRINT = (
    "name: print\nID: 5\nformat:\n\tfield:unsigned long ip;\toffset:8;\tsize:8;\tsigned:0;\n"
    "\tfield:%s;\toffset:16;\tsize:0;\tsigned:%d;\n"
)


@pytest.mark.parametrize(
    ("declared", "name", "dtype"),
    [("char buf", "buf", "S"), ("char buf[]", "buf", "S"), ("char[] buf", "buf", "S"), ("u32 buf", "buf", "O")],
)
def test_arrays_of_no_size_run_to_the_end_of_the_record(declared, name, dtype):
    """Until 5.x `char buf` had no brackets."""
    field = parse_event_format(OLD_PRINT % (declared, 1), "ftrace").fields[name]
    assert (field.dtype.kind, field.place) == (dtype, TO_END)


@pytest.mark.parametrize(
    ("declared", "name", "type_text", "dtype"),
    [
        ("char comm[16]", "comm", "char", "S16"),
        ("char comm[TASK_COMM_LEN]", "comm", "char", "S16"),
        ("char[16] comm", "comm", "char", "S16"),
        ("unsigned int  x", "x", "unsigned int", None),
        ("struct file * filp", "filp", "struct file *", None),
        ("__u8 insn[15]", "insn", "__u8", None),
        ("const char * const who", "who", "const char * const", None),
        ("u8 a [ 4 ]", "a", "u8", None),
    ],
)
def test_declarations(declared, name, type_text, dtype):
    fields = parse_event_format(OLD_PRINT.replace("size:0", "size:16") % (declared, 0), "kvm").fields
    assert fields[name].type_text == type_text
    assert dtype is None or fields[name].dtype == np.dtype(dtype)


@pytest.mark.parametrize("declared", ["", " ", "[4]", "9x", "]", "[", "a[", "*", "a]b["])
def test_declarations_that_are_none_raise_nothing(declared):
    assert parse_event_format(OLD_PRINT % (declared, 0), "kvm") is not None
