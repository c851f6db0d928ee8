"""Draws a picture from Python in five lines. Takes the file to write as its argument."""

import sys

from physformer_core import PhysFormerPipeline, shipped_checkpoint

pipeline = PhysFormerPipeline.from_pretrained(shipped_checkpoint())
image = pipeline("a bird in a cage", height=256, width=256, seeds=7).images[0]
image.save(sys.argv[1] if len(sys.argv) > 1 else "bird.png")
