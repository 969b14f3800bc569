# pycert/_build_info.py is written by setup.py when pycert._C is built.
TORCH_VERSION: str
CUDA_VERSION: str | None
