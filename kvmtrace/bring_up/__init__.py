"""A VM's construction followed step by step: objects, ioctls, the VMM's own functions."""
