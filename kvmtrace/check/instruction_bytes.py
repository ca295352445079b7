"""What the guest's instruction was, from the bytes that kvm_emulate_insn traces.

Only as much as RIP continuity needs: may it jump, may it repeat, is it a string instruction? Guests execute
few different instructions that need emulation, so each is decoded once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.table.distinct import run_starts

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

# kvm_emulate_insn.flags (arch/x86/kvm/trace.h)
CS_D = 1 << 2
CS_L = 1 << 3

MAX_BYTES = 15
ANYWHERE, BEHIND, REPEATS, PATCHED = 0, 1, 2, 3  # where the guest may continue
_KEY_BYTES = 24  # instruction, length, flags; a multiple of 8
OPERAND_BYTES, READS, WRITES = 16, 1 << 6, 1 << 7  # of what memory_operand() returns; bytes are the bits below
NAMES = ("anywhere", "behind the instruction", "behind it or at it (REP)", "behind it or at it (patched)")
# segment and stack-engine moves, far returns and mode switches are branches to iced-x86 or change nothing here
_REP_PREFIXES = (0xF2, 0xF3)
_PREFIXES = frozenset({0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3})
_STRING_OPCODES = frozenset({0x6C, 0x6D, 0x6E, 0x6F, 0xA4, 0xA5, 0xA6, 0xA7, 0xAA, 0xAB, 0xAC, 0xAD, 0xAE, 0xAF})
_INS_OUTS = frozenset({0x6C, 0x6D, 0x6E, 0x6F})
_IN_OUT = frozenset({0xE4, 0xE5, 0xE6, 0xE7, 0xEC, 0xED, 0xEE, 0xEF})  # bit 1: OUT; bit 0: longer than a byte
_OPERAND_SIZE = 0x66
# of what port_bits() returns, behind the size in bytes
PORT_SIZE, PORT_WRITE, PORT_STRING, PORT_REP, PORT_REPNE = 7, 1 << 3, 1 << 4, 1 << 5, 1 << 6
_HYPERCALLS = (b"\x0f\x01\xc1", b"\x0f\x01\xd9")  # VMCALL, VMMCALL: em_hypercall patches the other vendor's
_NESTED_ENTRIES = (b"\x0f\x01\xd8", b"\x0f\x01\xc2", b"\x0f\x01\xc3")  # a hypervisor's guest, unless KVM refuses
_RSM = b"\x0f\xaa"


def _bitness(flags: int) -> int:
    return 64 if flags & CS_L else 32 if flags & CS_D else 16


@lru_cache(maxsize=65536)
def continuation(code: bytes, flags: int) -> int:
    """Return where the guest may continue after an instruction: ANYWHERE, BEHIND, REPEATS or PATCHED."""
    from iced_x86 import Decoder, FlowControl

    if not code or code.startswith(_RSM):
        return ANYWHERE
    if code in _HYPERCALLS:
        return PATCHED
    if code in _NESTED_ENTRIES:
        return BEHIND
    rep, string = is_string(code)
    if string:
        return REPEATS if rep else BEHIND
    # bytes that are cut off do not matter: only the kind of instruction is asked for
    instruction = Decoder(_bitness(flags), code.ljust(MAX_BYTES, b"\0")).decode()
    if instruction.is_invalid:
        return ANYWHERE
    plain = instruction.flow_control == FlowControl.NEXT
    return BEHIND if plain else ANYWHERE


_WITHIN = np.arange(15) < np.arange(16)[:, None]  # by length: which bytes belong to the instruction


def is_string(code: bytes) -> tuple[bool, bool]:
    """Return (has a REP prefix, is a string instruction)."""
    rep = False
    for byte in code:
        if byte in _PREFIXES or (0x40 <= byte <= 0x4F and byte not in _STRING_OPCODES):
            rep |= byte in _REP_PREFIXES
            continue
        return rep, byte in _STRING_OPCODES
    return rep, False


def continuations(insn: NDArray[Any], length: NDArray[Any], flags: NDArray[Any]) -> NDArray[np.uint8]:
    """Return continuation() of each instruction; equal ones are decoded once.

    Parameters
    ----------
    insn : uint8, shape (n, 15); length, flags : shape (n,)
    """
    return _each_different(continuation, insn, length, flags)


def memory_operands(insn: NDArray[Any], length: NDArray[Any], flags: NDArray[Any]) -> NDArray[np.uint8]:
    """Return memory_operand() of each instruction; equal ones are decoded once.

    Parameters
    ----------
    insn : uint8, shape (n, 15); length, flags : shape (n,)
    """
    return _each_different(memory_operand, insn, length, flags)


def decoded_lengths(insn: NDArray[Any], length: NDArray[Any], flags: NDArray[Any]) -> NDArray[np.uint8]:
    """Return decoded_length() of each instruction; equal ones are decoded once.

    Parameters
    ----------
    insn : uint8, shape (n, 15); length, flags : shape (n,)
    """
    return _each_different(decoded_length, insn, length, flags)


@lru_cache(maxsize=65536)
def decoded_length(code: bytes, flags: int) -> int:
    """Return how long the instruction is that begins with these bytes, zeros behind them; 0 if they are none."""
    from iced_x86 import Decoder

    if not code:
        return 0
    instruction = Decoder(_bitness(flags), code.ljust(MAX_BYTES, b"\0")).decode()
    return 0 if instruction.is_invalid else int(instruction.len)


@lru_cache(maxsize=65536)
def port_bits(code: bytes, flags: int) -> int:
    """Return size, direction, string and REP bits of an access to a port; 0 if it is none, or not that plain."""
    prefixes: set[int] = set()
    for byte in code:
        if byte in _PREFIXES:
            prefixes.add(byte)
            continue
        if byte not in _INS_OUTS and byte not in _IN_OUT:  # among them what has a REX prefix
            return 0
        short = (_OPERAND_SIZE in prefixes) != (_bitness(flags) == 16)
        size = 1 if not byte & 1 else 2 if short else 4
        string = byte in _INS_OUTS
        rep = (PORT_REP if 0xF3 in prefixes else 0) | (PORT_REPNE if 0xF2 in prefixes else 0)
        return size | (PORT_WRITE if byte & 2 else 0) | (PORT_STRING | rep if string else 0)
    return 0


def ports_accessed(insn: NDArray[Any], length: NDArray[Any], flags: NDArray[Any]) -> NDArray[np.uint8]:
    """Return port_bits() of each instruction; equal ones are decoded once.

    Parameters
    ----------
    insn : uint8, shape (n, 15); length, flags : shape (n,)
    """
    return _each_different(port_bits, insn, length, flags)


def _each_different(
    decode: Callable[[bytes, int], int], insn: NDArray[Any], length: NDArray[Any], flags: NDArray[Any]
) -> NDArray[np.uint8]:
    """Return decode(bytes, flags) of each instruction."""
    at = run_starts(insn, length, flags)  # the guest's loops meet the same instruction again and again
    key = np.zeros((len(at), _KEY_BYTES), np.uint8)
    np.multiply(insn[at], _WITHIN.take(length[at], axis=0, mode="clip"), out=key[:, :15])
    key[:, 15], key[:, 16] = length[at], flags[at]
    unique, inverse = np.unique(key.view(f"V{_KEY_BYTES}").ravel(), return_inverse=True)
    found = np.array([decode(raw[: raw[15]], raw[16]) for raw in map(bytes, unique)], np.uint8)
    return np.repeat(found[inverse.ravel()], np.diff(at, append=len(insn)))


@lru_cache(maxsize=65536)
def memory_operand(code: bytes, flags: int) -> int:
    """Return bytes of the one memory operand of a plain instruction, with READS and WRITES; 0 if it is not that plain.

    Plain is what goes on behind itself, is no string instruction, and has one operand of 1 to 16 bytes in memory.
    """
    from iced_x86 import Decoder, FlowControl, InstructionInfoFactory, MemorySizeExt, OpAccess

    if not code or is_string(code)[1]:
        return 0
    instruction = Decoder(_bitness(flags), code.ljust(MAX_BYTES, b"\0")).decode()
    if instruction.is_invalid or instruction.flow_control != FlowControl.NEXT or instruction.len != len(code):
        return 0
    used = InstructionInfoFactory().info(instruction).used_memory()
    size = MemorySizeExt.size(used[0].memory_size) if len(used) == 1 else 0
    if not 0 < size <= OPERAND_BYTES:
        return 0
    access = used[0].access
    reads = access in (OpAccess.READ, OpAccess.COND_READ, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE)
    writes = access in (OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE)
    return size | (READS if reads else 0) | (WRITES if writes else 0)
