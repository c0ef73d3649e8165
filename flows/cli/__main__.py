"""`python -m mergeline.flows.cli`."""

from mergeline.flows.cli import command

if __name__ == "__main__":
    command()
