"""Instruction sets: exit reasons, what KVM owes after each, bit positions; everything that names a vendor."""
