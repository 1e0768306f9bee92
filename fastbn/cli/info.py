"""Print what this installation of fastbn is: versions, how it was built, which devices and backends it can use, and why
not the others."""

from fastbn.cli.text import outline
from fastbn.inspect.info import info

SUMMARY = "versions, build, devices, backends"


def add_arguments(parser):
    pass


def run(args) -> int:
    print("\n".join(outline(info())))
    return 0
