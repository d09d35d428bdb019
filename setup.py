"""Packages of the wheel: fewstep and fewstep_cuda as they lie, and configs/ as fewstep/configs."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["fewstep*", "fewstep_cuda*"]), "fewstep.configs"])
