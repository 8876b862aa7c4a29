"""The classifier and all that goes through it: taps, channels, extra columns, gradients, and its sources.

The home of torch. May import workspace and what lies below it; neither Ray nor datasets.
"""
