"""One run, as a validated and frozen configuration; the files it is read from; published tables beside them.

May import detectors and what lies below them. Opens no data and no model.
"""
