"""Well-known x86 I/O ports: number or range -> what a PC has there.

Sources: QEMU hw/i386 and hw/isa of 7.2 (the PC and Q35 machines), arch/x86/kvm/i8254.h, i8259.c;
arch/x86/kernel/setup.c (standard_io_resources).
"""

from __future__ import annotations

# (first port, last port, name); the first match wins, so narrow entries stand before wide ones
# fmt: off
PORT_RANGES: tuple[tuple[int, int, str], ...] = (
    (0x0000, 0x000F, "DMA controller 1"),
    (0x0020, 0x0021, "PIC master"),
    (0x002E, 0x002F, "Super I/O configuration"),
    (0x0040, 0x0043, "PIT"),
    (0x004E, 0x004F, "Super I/O configuration 2"),
    (0x0060, 0x0060, "keyboard data"),
    (0x0061, 0x0061, "NMI status, speaker"),
    (0x0064, 0x0064, "keyboard command"),
    (0x0070, 0x0071, "RTC, CMOS"),
    (0x0072, 0x0073, "CMOS extended bank"),
    (0x007E, 0x007F, "KVM vmport quirk, diagnostics"),
    (0x0080, 0x0080, "POST code, I/O delay"),
    (0x0092, 0x0092, "fast A20, reset"),
    (0x0081, 0x009F, "DMA pages"),
    (0x00A0, 0x00A1, "PIC slave"),
    (0x00B2, 0x00B3, "APM, SMI command"),
    (0x00C0, 0x00DF, "DMA controller 2"),
    (0x00E9, 0x00E9, "debug console"),
    (0x00ED, 0x00ED, "I/O delay"),
    (0x00F0, 0x00F1, "FPU error"),
    (0x00F4, 0x00F4, "isa-debug-exit (usual)"),
    (0x0170, 0x0177, "IDE secondary"),
    (0x01CE, 0x01D1, "Bochs VBE"),
    (0x01F0, 0x01F7, "IDE primary"),
    (0x0200, 0x0207, "game port"),
    (0x0220, 0x022F, "Sound Blaster"),
    (0x0278, 0x027F, "LPT2"),
    (0x02E8, 0x02EF, "COM4"),
    (0x02F8, 0x02FF, "COM2"),
    (0x0300, 0x031F, "NE2000 (usual)"),
    (0x0376, 0x0376, "IDE secondary control"),
    (0x0378, 0x037F, "LPT1"),
    (0x0388, 0x038B, "AdLib"),
    (0x03B0, 0x03DF, "VGA"),
    (0x03E8, 0x03EF, "COM3"),
    (0x03F0, 0x03F5, "floppy controller"),
    (0x03F6, 0x03F6, "IDE primary control"),
    (0x03F7, 0x03F7, "floppy controller"),
    (0x03F8, 0x03FF, "COM1"),
    (0x0402, 0x0402, "firmware debug console"),
    (0x04D0, 0x04D1, "PIC edge/level control"),
    (0x0505, 0x0505, "pvpanic"),
    (0x0510, 0x0511, "fw_cfg"),
    (0x0514, 0x051B, "fw_cfg DMA"),
    (0x0600, 0x067F, "ACPI power management"),
    (0x0700, 0x073F, "SMBus (q35)"),
    (0xAF00, 0xAF1F, "ACPI CPU hot-plug (pc)"),
    (0x0CD8, 0x0CE3, "ACPI CPU hot-plug (q35)"),
    (0x0CF8, 0x0CF8, "PCI configuration address"),
    (0x0CF9, 0x0CF9, "reset control"),
    (0x0CFC, 0x0CFF, "PCI configuration data"),
    (0x5658, 0x5658, "VMware backdoor"),
    (0xAE00, 0xAE13, "ACPI PCI hot-plug"),
    (0xAFE0, 0xAFE3, "ACPI GPE0"),
    (0xB000, 0xB03F, "ACPI power management (older firmware)"),
    (0xB100, 0xB13F, "SMBus (pc)"),
)
# fmt: on


def describe_port(port: int) -> str:
    """Say what a PC has at an I/O port; "" where nothing is well known (the number is all there is)."""
    return next((name for first, last, name in PORT_RANGES if first <= port <= last), "")
