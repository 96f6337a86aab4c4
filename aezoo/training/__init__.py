"""What a training run needs beside Lightning: optimisers, compilation, precision, processes, seeds, checks."""
