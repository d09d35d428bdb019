"""Build of the embedded teacher `fashion-dit` and of its classifier: `python -m fewstep.teachers.fashion_build`."""
