"""What KVM will trace for a bundled guest, predicted from its listing, and the recording beside it."""
