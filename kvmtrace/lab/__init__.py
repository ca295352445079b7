"""Emulated hosts with real kvm_intel and kvm_amd."""
