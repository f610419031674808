"""Generate a video from a first picture: python examples/from_a_picture.py [MODEL].

Here the picture is a frame of another video; any PNG or JPEG works.
"""

import sys
from pathlib import Path

import skyloom
from skyloom.media.write import write_picture

pipeline = skyloom.load(sys.argv[1] if len(sys.argv) > 1 else "diorama")
first = pipeline.generate("a penguin walking to the right in the snow", seed=1)
picture = write_picture(first.frames[0], Path("penguin.png"))
video = pipeline.generate("a penguin walking to the left in the snow", seed=2, image=picture)
print(video.save("penguin.mp4"))
