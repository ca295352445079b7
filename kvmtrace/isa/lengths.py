"""Names that check/ still uses: ExitRow.longest."""

from __future__ import annotations

from kvmtrace.isa.registry import ISAS

LONGEST_USUAL = {isa.number: {row.code: row.longest for row in isa.rows if row.longest} for isa in ISAS}
