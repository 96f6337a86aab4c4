"""Models of the zoo in the formats of other libraries, one format a file."""
