"""Recordings to shards: `sources` finds and divides files, `pack` plans and writes, `verify` checks, `report` prints."""
