"""Recordings to shards: `sources` finds and divides, `pack` plans and writes, `verify` checks, `report` prints."""
