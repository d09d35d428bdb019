"""Scores of packages that live in another environment: a process there is asked in JSON and answers in JSON."""
