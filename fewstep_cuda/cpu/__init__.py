"""C++ for the CPU: compiled on first use into a cache, loaded by ctypes, fp32."""

from fewstep_cuda.cpu.build import failure, library, status

__all__ = ["failure", "library", "status"]
