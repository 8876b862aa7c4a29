"""Ray job: the forward pass only, into the feature cache.

ray job submit --working-dir . -- python jobs/extract.py quickstart --workspace /shared/workspace
"""

import sys

from pipeline.cli.main import main

sys.argv.insert(1, "extract")
main()
