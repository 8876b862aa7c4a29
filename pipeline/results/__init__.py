"""What a finished evaluation says: the run record, the report, the recount, and MLflow.

Reads files of a run; runs no model. May import stages and what lies below them.
"""
