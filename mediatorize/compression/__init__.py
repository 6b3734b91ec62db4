"""The algorithms, on models and tensors: no files, no terminal."""
