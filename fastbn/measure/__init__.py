"""Timing of one op beside its rivals, each checked against float64 first: `fastbn bench --shape`, and bench/."""
