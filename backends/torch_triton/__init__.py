"""The torch backend: graphs as torch modules, with Triton kernels where a GPU is."""
