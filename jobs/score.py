"""Ray job: score cached rows with fitted detectors.

ray job submit --working-dir . -- python jobs/score.py quickstart --workspace /shared/workspace
"""

import sys

from pipeline.cli.main import main

sys.argv.insert(1, "score")
main()
