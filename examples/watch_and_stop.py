"""Preview a video during generation, and stop if it is too dark.

python examples/watch_and_stop.py [MODEL]
"""

import sys
from pathlib import Path

import skyloom
from skyloom.media.write import write_picture

DARK = 8

pipeline = skyloom.load(sys.argv[1] if len(sys.argv) > 1 else "diorama")
request = skyloom.Request("a yellow balloon floating in the sky during the day", seed=3)
for step in pipeline.stream(request):
    print(f"{step.phase} {step.index}/{step.total}")
    picture = step.preview()
    if picture is not None and step.index == step.total:
        write_picture(picture, Path("preview.png"))
        if picture.float().mean() < DARK:
            print("The preview is black: stopped before decoding.")
            break
    if step.video is not None:
        print(step.video.save("balloon.gif"))
