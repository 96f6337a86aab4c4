"""What keeps a file from a stranger from running code, filling the memory or leaving its folder; see SECURITY.md.

`policy` decides which classes a configuration may name, `yaml_text` reads YAML within bounds, `values` admits plain
values only, and `archives` looks into zip and tar files before they are unpacked.
"""
