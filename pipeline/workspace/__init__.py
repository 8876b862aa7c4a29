"""Files of a workspace, local or in an object store: places, tables, artifacts, and who holds it.

May import config and what lies below it. Knows nothing of what the files mean.
"""
