"""The codec behind compress and decompress, and its file format `.aez`.

    container.py   the file: header, frames, checksum
    tables.py      integer tables of probabilities and the two entropy coders that use them
    levels.py      data values as integers, and their probabilities
    lossless.py    bits-back coding for likelihood models
    lossy.py       quantised codes, coded with histograms
    indices.py     indices of a model's code, coded with tables
    autoregressive.py   the same, coded with the model's prior
    entropy_model.py     integers of a code under entropy models that the model has learned
    pictures.py    pictures of several sizes in one file, in each of these ways
    reproducibility.py   what the arithmetic depends on: the model's fingerprint, threads, deterministic kernels
    baselines.py   PNG, WebP, JPEG, AVIF, gzip, xz, PCA on the same data

How decoding returns the same bytes or is refused: the coders see only integers (tables.py), and a file stores only
integers. Some tables come from a network's floats (lossless, prior, learned), and so does the output (all modes but
lossless). These floats equal the writer's as long as the arithmetic is the same: the same network on the same batch
shapes, the same number of threads, no autotuned kernels (reproducibility.py). A machine whose arithmetic differs in the
last bit is detected by the digest of its decoded samples in every frame, by the initial bits, which must be recovered,
and by checks of the integers in frames under a prior or learned distributions. The file is then refused.
"""
