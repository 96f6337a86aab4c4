"""Components that several networks or models share."""
