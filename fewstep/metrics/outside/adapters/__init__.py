"""Scripts that run in another environment: each the standard library of Python 3.8, one package, and fewstep_adapter.

None is called like its package: a script's folder is searched first, so that it would import itself.
"""
