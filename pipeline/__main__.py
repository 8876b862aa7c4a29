"""`python -m pipeline`: the command, in a submitted job with the environment that came with it."""

from pipeline import cli, environment

if __name__ == "__main__":
    environment.load()
    cli.main()
