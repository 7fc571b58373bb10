"""The picture of a run in README.md: `make picture`, or `python benchmarks/accuracy/picture.py`.

Runs `resuscitate prune` and `resuscitate repair` on the trained ResNet-20 and 512 unlabelled images, and records what
they print, but for the description of the masks. Writes picture.svg and picture.txt.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in (".", "python")]  # this checkout

from benchmarks.common.inputs import MEAN, STD, DataFolder, data_folder
from benchmarks.common.results import RESULTS
from resuscitate.cli import app

WIDTH = 112
PRUNE = "resuscitate prune --model resnet20 --dense dense.safetensors --sparsity 0.9 --output pruned.safetensors"
REPAIR = """resuscitate repair --model resnet20 --pruned pruned.safetensors --dense dense.safetensors \\
    --calibration images.npz --max-samples 512 --mean {mean} --std {std} \\
    --output repaired.safetensors --report run.json"""


def main(
    data: DataFolder = None,
    output: Annotated[Path, typer.Option(help="The .svg file; the text goes beside it.")] = RESULTS / "picture.svg",
) -> None:
    """Run both commands, and write what they print as a picture and as text."""
    folder, output = data_folder(data).resolve(), output.resolve()
    repair = REPAIR.format(mean=",".join(map(str, MEAN)), std=",".join(map(str, STD)))
    console = Console(record=True, width=WIDTH, file=StringIO(), highlight=False)
    with TemporaryDirectory() as place:
        os.chdir(place)
        Path("dense.safetensors").symlink_to(folder / "cifar10_resnet20.safetensors")
        Path("images.npz").symlink_to(folder / "cifar10_jpeg_train.npz")
        for command, shown in ((PRUNE, 2), (repair, None)):
            done = CliRunner().invoke(app, shlex.split(command.replace("\\\n", " "))[1:], env={"COLUMNS": str(WIDTH)})
            if done.exit_code:
                sys.exit(done.output)
            console.print(Text(f"$ {command}", style="bold green"))
            lines = done.stdout.rstrip().splitlines()
            for line in lines if shown is None else lines[-shown:]:
                console.print(
                    Text(line, style="bold" if re.match("agreement |sparsity |size |time |next ", line) else "")
                )
            console.print()
    output.with_suffix(".txt").write_text(console.export_text(clear=False).rstrip() + "\n")
    # without the fonts that would be fetched from elsewhere
    picture = re.sub(
        r"@font-face \{.*?\}\s*", "", console.export_svg(title="resuscitate", unique_id="run"), flags=re.DOTALL
    )
    output.write_text(picture)


if __name__ == "__main__":
    typer.run(main)
