"""`python -m pipeline.cli`: the command, in a submitted job with the environment that came with it."""

from pipeline import cli
from pipeline.cluster.remote import environment

if __name__ == "__main__":
    environment.load()
    cli.main()
