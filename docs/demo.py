"""The demo's picture: every class of a bundle several times, and below, one row of it from coarse to fine.

python docs/demo.py BUNDLE PICTURE
"""

import sys

from PIL import Image

import var_deploy
from var_deploy.images import image_grid

ROWS = 6
GAP = 12  # pixels between the samples and the steps
ENLARGE = 2  # the digits are small

bundle, picture = sys.argv[1:]
pipe = var_deploy.load(bundle)
classes = list(range(pipe.bundle.manifest.var.num_classes))

steps: list[Image.Image] = []
images = pipe.generate(classes, seeds=0, on_scale=lambda preview: steps.extend(preview.images)).images
for row in range(1, ROWS):
    images += pipe.generate(classes, seeds=row * len(classes)).images

samples, coarse_to_fine = (image_grid(part, columns=len(classes)) for part in (images, steps))
page = Image.new("RGB", (samples.width, samples.height + GAP + coarse_to_fine.height), "white")
page.paste(samples, (0, 0))
page.paste(coarse_to_fine, (0, samples.height + GAP))
page = page.resize((page.width * ENLARGE, page.height * ENLARGE), Image.Resampling.NEAREST)
page.save(picture)
print(
    f"{picture}: {len(images)} samples of {len(classes)} classes, and the {len(steps) // len(classes)} steps of a row"
)
