"""Generate a video file from a sentence: python examples/first_video.py [MODEL]."""

import sys

import skyloom

pipeline = skyloom.load(sys.argv[1] if len(sys.argv) > 1 else "diorama")
video = pipeline.generate("a red rocket flying over the ocean at sunset", seed=7)
print(video.save("rocket.mp4"), f"({video.seconds:.1f} s, seed {video.receipt['request']['seed']})")
