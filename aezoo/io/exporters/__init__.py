"""Export of models to the formats of other libraries, one module per format."""
