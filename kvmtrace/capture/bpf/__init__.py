"""The eBPF back end: programs of tracers/ fill ring buffers or maps; bcc compiles them."""
