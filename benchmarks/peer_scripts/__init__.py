"""What runs in the processes of `benchmarks.peers`: one file a party, which needs only that party's packages."""
