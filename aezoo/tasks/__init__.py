"""Tasks for trained models: one file for each command, the same from Python and from the command line.

`aezoo.reconstruct(model, x)` and the other functions take a model and samples; `aezoo reconstruct --ckpt_path RUN`
reads both from files and writes the results to a folder.
"""
