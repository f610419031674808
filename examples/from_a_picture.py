"""A video that starts with a picture: python examples/from_a_picture.py [MODEL].

The picture is the first frame of another video here; any PNG or JPEG does as well.
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
