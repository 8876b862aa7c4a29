"""Ray-distributed batch evaluation of out-of-distribution detectors.

From Python:

    import pipeline
    evaluation = pipeline.run(pipeline.load_config("quickstart"), engine="inline")
    evaluation.metrics.to_pandas()
    pipeline.load_bundle("detector.ood")(["image.jpg"]).to_pandas()
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config.loading import load as load_config
    from pipeline.results.evaluation import Evaluation
    from pipeline.results.evaluation import opened as open_run
    from pipeline.stages.detect import load as load_bundle
    from pipeline.workflows.run import evaluated as run

__version__ = "0.3.0"
__all__ = ["Evaluation", "__version__", "load_bundle", "load_config", "open_run", "run"]

_PLACES = {
    "Evaluation": ("pipeline.results.evaluation", "Evaluation"),
    "load_bundle": ("pipeline.stages.detect", "load"),
    "load_config": ("pipeline.config.loading", "load"),
    "open_run": ("pipeline.results.evaluation", "opened"),
    "run": ("pipeline.workflows.run", "evaluated"),
}


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for: `import pipeline` alone takes no time."""
    from importlib import import_module

    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(import_module(module), attribute)
