"""Print versions, how fastbn was built, which devices and backends it can use here, and why not the others."""

import argparse

from fastbn.cli.text import outline
from fastbn.inspect.info import info

SUMMARY = "versions, build, devices, backends"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command has no options."""


def run(args: argparse.Namespace) -> int:
    """Print `fastbn.info()`. Returns 0."""
    print("\n".join(outline(info())))
    return 0
