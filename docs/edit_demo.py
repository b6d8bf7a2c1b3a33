"""The picture of editing: held-out digits, and each with its lower half redrawn as every class.

python docs/edit_demo.py BUNDLE PICTURE
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from var_deploy.images import image_grid
from var_train.digits_data import CLASS_NAMES, load_split

DIGITS = (3, 7, 9, 0, 2)  # the first held-out one of each
GAP = 12  # pixels between the originals and the edits
ENLARGE = 2  # the digits are small

bundle, picture = sys.argv[1:]
held_out = load_split().held_out
originals, edits = [], []
with tempfile.TemporaryDirectory() as directory:
    for digit in DIGITS:
        pixels = held_out.images_N3RR[np.flatnonzero(held_out.labels_N == digit)[0]]
        original = Image.fromarray(np.rint(pixels.transpose(1, 2, 0) * 255).astype(np.uint8))
        source, out = Path(directory) / f"{digit}.png", Path(directory) / f"edits_{digit}"
        original.save(source)
        command = [sys.executable, "-m", "var_deploy.cli", "edit", bundle, source, "--box", "0.5,0,1,1", "--out", out]
        for name in CLASS_NAMES:
            command += ["--class", name]
        command += ["--guidance", "2", "--top-k", "0", "--top-p", "0.95"]
        subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
        originals.append(original)
        for path in sorted(out.iterdir()):
            with Image.open(path) as image:
                edits.append(image.convert("RGB"))

left, right = image_grid(originals, columns=1), image_grid(edits, columns=len(CLASS_NAMES))
page = Image.new("RGB", (left.width + GAP + right.width, right.height), "white")
page.paste(left, (0, 0))
page.paste(right, (left.width + GAP, 0))
page = page.resize((page.width * ENLARGE, page.height * ENLARGE), Image.Resampling.NEAREST)
page.save(picture)
print(f"{picture}: the lower half of {len(originals)} held-out digits as each of {len(CLASS_NAMES)} classes")
