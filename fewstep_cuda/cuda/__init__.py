"""Plain CUDA kernels, without torch's headers: compiled by nvcc on first use, loaded by ctypes.

They compile for sm_80, 90 and 100 without a spill and share the mathematics of an element with the C++ kernels, whose
tests cover it.  They are tested on an H200.
"""

from fewstep_cuda.cuda.build import failure, library, status

__all__ = ["failure", "library", "status"]
