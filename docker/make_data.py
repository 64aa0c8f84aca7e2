"""Draws synthetic faces for each site's volume that holds nothing yet; a folder of one's own pictures stays as it is.

python make_data.py FOLDER PEOPLE PICTURES LAYOUT ...: FOLDER/LAYOUT gets that layout.
"""

import shutil
import subprocess
import sys
from pathlib import Path


def main(folder: Path, people: str, pictures: str, layouts: list[str]) -> None:
    """Draw beside, then move: what is there is whole."""
    for layout in layouts:
        target = folder / layout
        half = target / ".drawing"
        shutil.rmtree(half, ignore_errors=True)  # of a start that was cut off
        if any(target.iterdir()):
            sys.stdout.write(f"{target} holds pictures already; nothing is drawn\n")
            continue
        number = ["--families", str(int(people) // 2)] if layout == "twins" else ["--people", people]
        command = ["facefed", "data", "synth", "--layout", layout, "--out", str(half), *number, "--pictures", pictures]
        subprocess.run(command, check=True)
        for path in half.iterdir():
            path.rename(target / path.name)
        half.rmdir()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
