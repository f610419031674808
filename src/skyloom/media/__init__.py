"""Video and pictures in and out. Frames are uint8 tensors [t h w c]."""
