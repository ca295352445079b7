"""Texts of header_page, header_event and event formats, as tracefs shows them."""

from __future__ import annotations

COMMON = """\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;
"""


def header_page(data_size: int = 4080) -> bytes:
    return (
        f"\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;\n"
        f"\tfield: local_t commit;\toffset:8;\tsize:8;\tsigned:1;\n"
        f"\tfield: int overwrite;\toffset:8;\tsize:1;\tsigned:1;\n"
        f"\tfield: char data;\toffset:16;\tsize:{data_size};\tsigned:0;\n"
    ).encode()


HEADER_EVENT = b"""# compressed entry header
\ttype_len    :    5 bits
\ttime_delta  :   27 bits
\tarray       :   32 bits

\tpadding     : type == 29
\ttime_extend : type == 30
\ttime_stamp : type == 31
\tdata max type_len  == 28
"""


def event_format(
    name: str, number: int, fields: list[tuple[str, int, int, int]], print_fmt: str = '""', common: str = COMMON
) -> bytes:
    """A format file; fields are (declaration, offset, size, signed)."""
    lines = "".join(f"\tfield:{d};\toffset:{o};\tsize:{s};\tsigned:{g};\n" for d, o, s, g in fields)
    return f"name: {name}\nID: {number}\nformat:\n{common}\n{lines}\nprint fmt: {print_fmt}\n".encode()


# the layout of 6.1's kvm_entry and kvm_exit, packed by hand below
KVM_ENTRY = event_format("kvm_entry", 10, [("unsigned int vcpu_id", 8, 4, 0), ("unsigned long rip", 16, 8, 0)])
KVM_EXIT = event_format(
    "kvm_exit",
    11,
    [
        ("unsigned int exit_reason", 8, 4, 0),
        ("unsigned long guest_rip", 16, 8, 0),
        ("u32 isa", 24, 4, 0),
        ("u64 info1", 32, 8, 0),
        ("u64 info2", 40, 8, 0),
        ("u32 intr_info", 48, 4, 0),
        ("u32 error_code", 52, 4, 0),
        ("unsigned int vcpu_id", 56, 4, 0),
    ],
)
SWITCH = event_format(
    "sched_switch", 12, [("char prev_comm[16]", 8, 16, 0), ("pid_t prev_pid", 24, 4, 1), ("long prev_state", 32, 8, 1)]
)
EXEC = event_format(
    "sched_process_exec",
    13,
    [("__data_loc char[] filename", 8, 4, 0), ("bool ok", 12, 1, 0), ("__u8 bytes[3]", 13, 3, 0)],
)
FORMATS = {"kvm": [KVM_ENTRY, KVM_EXIT], "sched": [SWITCH, EXEC]}
