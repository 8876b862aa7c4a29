"""Ray job: a whole evaluation, from images to report.

ray job submit --working-dir . -- python jobs/evaluate.py quickstart --workspace /shared/workspace
"""

import sys

from pipeline.cli.main import main

sys.argv.insert(1, "run")
main()
