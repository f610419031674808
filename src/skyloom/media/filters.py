"""stub until the media branch has it"""


def upscale(frames, size):
    raise NotImplementedError


def interpolate(frames, fps, times):
    raise NotImplementedError
