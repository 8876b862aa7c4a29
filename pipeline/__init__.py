"""Ray-distributed batch evaluation of out-of-distribution detectors."""

from importlib.metadata import version

__version__ = version("ood-pipeline")
