"""The two 8259 interrupt controllers of a PC: their ports and command words.

Sources: pic_ioport_write (arch/x86/kvm/i8259.c); Intel "8259A Programmable Interrupt Controller"
"""

from __future__ import annotations

# first port of each controller: commands there, data behind it
MASTER_PORT, SLAVE_PORT = 0x20, 0xA0
PIC_PORTS: tuple[int, ...] = (MASTER_PORT, MASTER_PORT + 1, SLAVE_PORT, SLAVE_PORT + 1)
CASCADE_PIN = 2  # the pin of the master that the slave is wired to
N_PINS = 8  # of each
SPURIOUS_PIN = 7  # whose vector stands for a request that was gone when it was to be acknowledged
FIRST_LAPIC_VECTOR = 16  # a LAPIC takes no lower one

INITIALIZE = 0x10  # command: the words behind it set vector base, wiring and, if HAS_LAST_WORD, modes
HAS_LAST_WORD = 0x01
OTHER_COMMAND = 0x08  # reads and masks: neither the first word nor an end of interrupt
BASE_MASK = 0xF8  # of the second word
AUTO_EOI = 0x02  # in the last word
# upper three bits of an end of interrupt that names no pin: it ends the highest one in service
NON_SPECIFIC_EOIS: tuple[int, ...] = (1, 5)
SPECIFIC_EOIS: tuple[int, ...] = (3, 7)  # ... that names one, in the lower three bits
ROTATE = 0x80


def rotates(value: int) -> bool:
    """Say whether a command changes which pin is the highest, or may."""
    return bool(value & ROTATE) and not value & (INITIALIZE | OTHER_COMMAND)


def ends_some_pin(value: int) -> bool:
    """Say whether a command ends the interrupt of a pin that it does not name."""
    return not value & (INITIALIZE | OTHER_COMMAND) and value >> 5 in NON_SPECIFIC_EOIS


def ends_named_pin(value: int) -> bool:
    """Say whether a command ends the interrupt of the pin that it names."""
    return not value & (INITIALIZE | OTHER_COMMAND) and value >> 5 in SPECIFIC_EOIS
