"""Bounded, seeded fuzzing of every kind of file and of configurations.

    python -m tests.fuzz --files 5000 --configs 1000 [--out FILE.json]

A case is a valid file with a few edits, or a well-formed file with hostile content. It is read in the way a user would
read it, and must either be read or be refused with an `AezooError` of one line, within seconds and without much memory.
`kinds` defines the files and how they are read, `edits` the damage, `contents` the hostile content and `configs` the
configurations; `__main__` runs the cases and counts the results.
"""
