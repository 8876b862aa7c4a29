"""Whole commands as a sequence of stages: an evaluation, a search for parameters.

May import everything but the command line.
"""
