"""Ray job: fit the detectors on cached features.

ray job submit --working-dir . -- python jobs/fit.py quickstart --workspace /shared/workspace
"""

import sys

from pipeline.cli.main import main

sys.argv.insert(1, "fit")
main()
