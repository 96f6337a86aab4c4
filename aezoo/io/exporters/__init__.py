"""Models of the zoo in the formats of other libraries, one file for each format."""
