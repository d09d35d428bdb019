"""Scripts that run in another environment: each the standard library of Python 3.8 and one package.

None is called like its package: a script's folder is searched first, so that it would import itself.
"""
