"""Tests of Triton kernels in Triton's interpreter, in a process of their own; see tests/ops/test_interpreter.py.

Two defects of the interpreter of triton 3.8: it hands bfloat16 to numpy's product as the integers that hold it (mended
below), and it truncates where it rounds to bfloat16, so that such outputs are compared with twice the tolerance.
It checks no races, layouts, alignments or limits of shared memory: a kernel that passes here has not run on a device.
"""

import os

import numpy as np

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
else:
    from triton.runtime import interpreter

    _dot = interpreter.InterpreterBuilder.create_dot

    def _decoded(handle):
        """bfloat16, held as uint16, as float32."""
        if handle.data.dtype != np.uint16:
            return handle
        values = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(values, interpreter.tl.float32)

    def _create_dot(self, a, b, *rest, **more):
        return _dot(self, _decoded(a), _decoded(b), *rest, **more)

    interpreter.InterpreterBuilder.create_dot = _create_dot
