"""Pure functions of scores: metrics of detectors, and comparisons with their intervals.

Array in, number out; may import columns and errors only.
"""
