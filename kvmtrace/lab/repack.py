"""Repacks a bzImage so that its kernel lies in it uncompressed.

Decompressing the kernel takes 38 of the 56 s that a VMX lab would need to boot. The decompressor's work (unpack,
place, enter 64-bit mode) is done here and in 130 bytes of code: the real-mode setup stays as it is, what follows
it is a stub and the kernel as it will lie in memory. KASLR must be off, because nothing relocates the kernel.

Source: Documentation/x86/boot.rst (32-bit and 64-bit boot protocol), arch/x86/boot/compressed/{head_64.S,misc.c}
"""

from __future__ import annotations

import lzma
import struct

from kvmtrace.errors import CapabilityError

# offsets in the setup header
SETUP_SECTS = 0x1F1
SYSSIZE = 0x1F4
VERSION = 0x206
RELOCATABLE_KERNEL = 0x234
PAYLOAD_OFFSET = 0x248
PAYLOAD_LENGTH = 0x24C

LOAD_ADDRESS = 0x100000  # where boot loaders put what follows the setup
STUB_BYTES = 0x1000
PAGE_TABLES = 0x800000  # in the image's first place, free once it has been moved
PT_LOAD = 1
_XZ = b"\xfd7zXZ\0"
_ZSTD = b"\x28\xb5\x2f\xfd"


def repack_kernel(image: bytes) -> bytes:
    """Return the same kernel as a bzImage without compression.

    Parameters
    ----------
    image : a bzImage, boot protocol 2.08 or later, compressed with xz or zstd

    Raises
    ------
    CapabilityError
        It is none, or is compressed otherwise.
    """
    if image[0x202:0x206] != b"HdrS" or struct.unpack_from("<H", image, VERSION)[0] < 0x208:
        raise CapabilityError("the kernel is no bzImage")
    setup_bytes = (image[SETUP_SECTS] + 1) * 512
    offset, length = struct.unpack_from("<II", image, PAYLOAD_OFFSET)
    start, entry, memory = _flatten(_decompress(image[setup_bytes + offset : setup_bytes + offset + length]))
    memory += b"\0" * (-len(memory) % 16)
    protected = _stub(start, entry, len(memory)).ljust(STUB_BYTES, b"\0") + memory
    setup = bytearray(image[:setup_bytes])
    struct.pack_into("<I", setup, SYSSIZE, len(protected) // 16)
    # 2.09 has no preferred address yet: loaders then use LOAD_ADDRESS
    struct.pack_into("<H", setup, VERSION, 0x209)
    setup[RELOCATABLE_KERNEL] = 0
    return bytes(setup) + protected


def _decompress(payload: bytes) -> bytes:
    if payload.startswith(_XZ):
        return lzma.LZMADecompressor().decompress(payload)  # the size behind the stream is left alone
    if payload.startswith(_ZSTD):
        import zstandard

        return zstandard.ZstdDecompressor().decompressobj().decompress(payload)
    raise CapabilityError(f"the kernel is compressed by something else than xz and zstd ({payload[:4].hex()})")


def _flatten(elf: bytes) -> tuple[int, int, bytes]:
    """Return a vmlinux's lowest physical address, its entry point and its memory from there on."""
    if elf[:4] != b"\x7fELF":
        raise CapabilityError("the kernel's payload is no ELF file")
    entry, table = struct.unpack_from("<QQ", elf, 24)
    size, count = struct.unpack_from("<HH", elf, 54)
    # p_type, p_flags, p_offset, p_vaddr, p_paddr, p_filesz
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    loads = [(paddr, offset, n) for kind, _, offset, _, paddr, n in headers if kind == PT_LOAD]
    start = min(paddr for paddr, _, _ in loads)
    memory = bytearray(max(paddr + n for paddr, _, n in loads) - start)
    for paddr, offset, n in loads:
        memory[paddr - start : paddr - start + n] = elf[offset : offset + n]
    return start, entry, bytes(memory)


def _stub(start: int, entry: int, length: int) -> bytes:
    """Return the code that a boot loader's real-mode setup jumps to, at LOAD_ADDRESS in 32-bit mode."""
    source = LOAD_ADDRESS + STUB_BYTES
    table = LOAD_ADDRESS + 0x100  # the GDT, then its pointer
    code = [
        b"\xfa",  # cli
        b"\x89\xf5",  # mov ebp, esi         boot_params
        b"\xbe" + _u32(source + length - 4),  # mov esi, last dword of the kernel
        b"\xbf" + _u32(start + length - 4),  # mov edi, its place
        b"\xb9" + _u32(length // 4),  # mov ecx, dwords
        b"\xfd\xf3\xa5\xfc",  # std; rep movsd; cld  the two overlap
        b"\xbf" + _u32(PAGE_TABLES),  # mov edi, PML4, PDPT, 4 page directories
        b"\x31\xc0\xb9" + _u32(6 * 1024) + b"\xf3\xab",  # xor eax, eax; mov ecx, ...; rep stosd
        b"\xc7\x05" + _u32(PAGE_TABLES) + _u32(PAGE_TABLES + 0x1003),  # PML4[0] = PDPT | present, writable
        *(
            b"\xc7\x05" + _u32(PAGE_TABLES + 0x1000 + 8 * i) + _u32(PAGE_TABLES + 0x2003 + 0x1000 * i) for i in range(4)
        ),  # PDPT[i] = page directory i
        b"\xbf" + _u32(PAGE_TABLES + 0x2000),  # mov edi, page directories
        b"\xb8\x83\x00\x00\x00",  # mov eax, 0x83        present, writable, 2 MiB
        b"\xb9" + _u32(2048),  # mov ecx, entries
        b"\x89\x07",  # next: mov [edi], eax
        b"\x05\x00\x00\x20\x00",  # add eax, 2 MiB
        b"\x83\xc7\x08",  # add edi, 8
        b"\xe2\xf4",  # loop next
        b"\x0f\x01\x15" + _u32(table + 32),  # lgdt
        b"\x0f\x20\xe0\x83\xc8\x20\x0f\x22\xe0",  # cr4 |= PAE
        b"\xb8" + _u32(PAGE_TABLES) + b"\x0f\x22\xd8",  # cr3 = PML4
        b"\xb9\x80\x00\x00\xc0\x0f\x32",  # mov ecx, EFER; rdmsr
        b"\x0d\x00\x01\x00\x00\x0f\x30",  # or eax, LME; wrmsr
        b"\x0f\x20\xc0\x0d\x00\x00\x00\x80\x0f\x22\xc0",  # cr0 |= PG
    ]
    here = LOAD_ADDRESS + sum(map(len, code)) + 7
    code += [
        b"\xea" + _u32(here) + b"\x10\x00",  # jmp 0x10:here        64-bit from here on
        b"\xb8\x18\x00\x00\x00",  # mov eax, 0x18
        b"\x8e\xd8\x8e\xc0\x8e\xd0\x8e\xe0\x8e\xe8",  # mov ds, es, ss, fs, gs
        b"\x89\xee",  # mov esi, ebp         boot_params
        b"\xb8" + _u32(entry),  # mov eax, startup_64
        b"\xff\xe0",  # jmp rax
    ]
    program = b"".join(code)
    assert len(program) <= 0x100
    # null, unused, 64-bit code, data; limit and base
    segments = struct.pack("<QQQQHI", 0, 0, 0x00AF9A000000FFFF, 0x00CF92000000FFFF, 31, table)
    return program.ljust(0x100, b"\0") + segments


def _u32(value: int) -> bytes:
    return struct.pack("<I", value)
