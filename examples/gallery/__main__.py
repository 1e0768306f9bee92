"""Compute and draw a picture of docs/gallery.md, or all of them.

    python -m examples.gallery all --out docs/gallery --data /usr/share/datasets/fashion-mnist

Writes NAME.json, the numbers, and NAME.png, drawn from them. With --redraw the numbers are those that NAME.json has
already. Without --data the images are the digits that scikit-learn bundles.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import platform
import time
from pathlib import Path
from types import ModuleType

import torch
from matplotlib import rc_context

from examples.gallery import PICTURES
from examples.gallery.style import RC
from examples.lenet.data import Dataset, load_digits, load_idx_directory
from fastbn.cli.errors import CommandError


def compute(name: str, data: Dataset, **changes: object) -> dict:
    """Return the numbers of a picture, with its settings, versions and the seconds that one core took.

    `changes` replaces settings of the picture's module. Raises TypeError for one that it does not have.
    """
    module = picture(name)
    unknown = changes.keys() - module.SETTINGS.keys()
    if unknown:
        raise TypeError(f"{name}: expected settings among {sorted(module.SETTINGS)}, got {sorted(unknown)}")
    settings = {**module.SETTINGS, **changes}
    begin = time.process_time()
    numbers = module.compute(data, settings)
    seconds = round(time.process_time() - begin, 1)
    made = {"data": data.name, "torch": torch.__version__, "machine": platform.machine(), "cpu_seconds": seconds}
    return {"made": made, "settings": settings, **numbers}


def draw(name: str, results: dict, path: Path) -> None:
    """Write the PNG of a picture from its numbers. Its metadata `Source` is their `digest`."""
    with rc_context(RC):
        # Software would be matplotlib's version, which changes the file and nothing that is seen.
        picture(name).draw(results).savefig(path, metadata={"Software": None, "Source": digest(results)})


def digest(results: dict) -> str:
    """Return the SHA-256, in hexadecimal, of the text that holds the numbers of a picture."""
    return hashlib.sha256(written(results).encode()).hexdigest()


def picture(name: str) -> ModuleType:
    return importlib.import_module(f"examples.gallery.{name}")


def main(arguments: list[str] | None = None) -> None:
    lines = __doc__.splitlines()
    parser = argparse.ArgumentParser(prog="python -m examples.gallery", description=lines[0])
    parser.add_argument("name", choices=[*PICTURES, "all"], metavar="NAME", help=f"all, or {', '.join(PICTURES)}")
    parser.add_argument("--out", type=Path, default=Path("gallery"), help="folder of results (default: gallery)")
    parser.add_argument("--data", type=Path, help="folder of (Fashion-)MNIST's four IDX files")
    parser.add_argument("--redraw", action="store_true", help="draw from the JSON files in --out, without computing")
    args = parser.parse_args(arguments)
    names = PICTURES if args.name == "all" else [args.name]
    torch.set_num_threads(1)  # tensors are small, and the results do not depend on the machine's cores
    data = None
    if not args.redraw:
        try:
            data = load_idx_directory(args.data) if args.data else load_digits(0)
        except CommandError as error:
            parser.error(str(error))
        args.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        numbers = args.out / f"{name}.json"
        if data is not None:
            numbers.write_text(written(compute(name, data)))
        elif not numbers.is_file():
            parser.error(f"--redraw: expected the file {numbers}, got none")
        results = json.loads(numbers.read_text())
        draw(name, results, args.out / f"{name}.png")
        print(f"{name} ({results['made']['cpu_seconds']} s of one core)")
        for fact in picture(name).facts(results):
            print(f"  {fact}")


def written(results: dict) -> str:
    """Return the text of the JSON file: a line per entry of the outer dicts, floats with 6 significant digits."""

    def rounded(value):
        if isinstance(value, float):
            return float(f"{value:.6g}")
        if isinstance(value, dict):
            return {key: rounded(entry) for key, entry in value.items()}
        return [rounded(entry) for entry in value] if isinstance(value, (list, tuple)) else value

    def text(value, depth):
        if isinstance(value, dict) and depth < 4:
            entries = [f"{' ' * depth}{json.dumps(key)}: {text(entry, depth + 1)}" for key, entry in value.items()]
            return "{\n" + ",\n".join(entries) + "\n" + " " * (depth - 1) + "}"
        return json.dumps(value)

    return text(rounded(results), 1) + "\n"


if __name__ == "__main__":
    main()
