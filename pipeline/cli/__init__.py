"""The command `ood-pipeline`: a file for each group of commands, progress bars, and the doctor.

May import everything. Commands import the package when they run, so that `--help` is quick.
"""
