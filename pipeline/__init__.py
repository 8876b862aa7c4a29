"""Ray-distributed batch evaluation of out-of-distribution detectors."""

__version__ = "0.2.0"
