"""Build of the embedded teachers and of their classifier: `python -m fewstep.teachers.fashion_build`."""
