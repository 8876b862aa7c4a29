"""The stages of an evaluation, a file each: bytes become rows, rows statistics, scores, and metrics.

May import cluster, network, data and what lies below them; knows no command and no report.
"""
