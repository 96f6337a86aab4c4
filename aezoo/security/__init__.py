"""Protection against untrusted files that run code, fill the memory or write outside their folder; see SECURITY.md.

`policy` decides which classes a configuration may name, `yaml_text` reads YAML within limits, `values` accepts only
plain values, and `archives` inspects zip and tar files before they are unpacked.
"""
