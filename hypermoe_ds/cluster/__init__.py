"""Everything that reaches other machines: hosts, preflight, supervisor."""
