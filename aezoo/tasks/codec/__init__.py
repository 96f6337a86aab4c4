"""The codec behind compress and decompress, and its file format `.aez`.

    container.py   the file: header, frames, checksum
    tables.py      integer tables of probabilities and the two entropy coders that take them
    levels.py      data values as whole numbers, and their probabilities
    lossless.py    bits-back coding for likelihood models
    lossy.py       quantised codes under histograms
    indices.py     a model's own indices under tables
    autoregressive.py   and under the model's prior
    learned.py     whole numbers of a code under laws that the model has learned
    machine.py     what the arithmetic depends on: the model's fingerprint, threads, deterministic kernels
    baselines.py   PNG, WebP, JPEG, AVIF, gzip, xz, PCA on the same data

How decoding gives the same bytes or is refused: the coders see integers only (tables.py), and what is stored in a file
is stored as integers. Where a table comes from a network's floats (lossless, prior, learned), and where the output does
(all but lossless), the floats are those of the writer as long as the arithmetic is: the same network on the same batch
shapes, the same number of threads, no autotuned kernels (machine.py). A machine whose arithmetic differs in the last
bit is found out by the digest that every frame keeps of its decoded samples, by the initial bits, which must come back,
and by what a frame under a prior or learned laws says of its numbers; the file is then refused.
"""
