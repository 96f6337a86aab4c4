"""Everything that is only speed: without it the same numbers are computed, slower."""
