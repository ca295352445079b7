"""trace.dat, versions 6 and 7: layout, ring-buffer pages, rows."""
