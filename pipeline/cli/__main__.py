"""`python -m pipeline.cli`: the command, in a submitted job with the environment that came with it."""

from pipeline.cli.main import main
from pipeline.cluster.remote import environment

if __name__ == "__main__":
    environment.load()
    main()
