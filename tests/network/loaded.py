"""A network that a test has at hand, as the stages see one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.network.classifier import Classifier
from pipeline.network.known import Network


class Loaded(Network):
    """Without a note in a workspace: everything is tested."""

    def __init__(self, classifier: Classifier) -> None:
        self.__dict__ |= {"description": classifier, "loaded": classifier}

    def check(self, what: Any, test: Callable[[Classifier], object]) -> None:
        test(self.loaded)
