"""`python -m megatron_exact VERB`: the console script, where it is not on the PATH."""

from megatron_exact.cli import run

if __name__ == "__main__":
    run("python -m megatron_exact")
