"""From a dataset on some storage to pixels: manifests, formats, labels, filters, fetching and decoding.

May import workspace and what lies below it; neither torch nor Ray.
"""
