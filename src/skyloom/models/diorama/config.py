"""Record of the diorama family: small videos of things in places, made on a CPU."""

from skyloom.models.family import ModelFamily, Quality, Schedule, SizeRule

FAMILY = ModelFamily(
    name="diorama",
    licence="Apache-2.0",
    sizes=SizeRule(multiple=32, min_side=64, max_side=256, max_area=256 * 256, default=(256, 256)),
    fps=16,
    frames=33,
    num_steps=20,
    guidance_scale=2.0,
    schedule=Schedule(shift=2.0),
    few_step=Quality(num_steps=4, guidance_scale=1.0, student=True),
    edit_verbs=(
        "remix",
        "restyle",
        "retake",
        "inpaint",
        "extend",
        "recut",
        "loop",
        "blend",
        "stitch",
    ),
)
