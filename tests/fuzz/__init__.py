"""Bounded, seeded fuzzing of every kind of file and of configurations.

    python -m tests.fuzz --files 5000 --configs 1000 [--out FILE.json]

A case is an honest file with a few edits. It is read in the way a user would read it, and must either be read or be
refused with an `AezooError` of one line, within seconds and without much memory. `kinds` has the files and how they are
read, `edits` the damage, `configs` the YAML, `__main__` the counting.
"""
