"""Scripts for the processes of `benchmarks.peers`: one file per party, which needs only that party's packages."""
