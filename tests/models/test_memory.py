"""The planner of memory: peaks, the choice of rungs, steps down, and sizes from file headers."""

from dataclasses import replace

import pytest

from skyloom.core.errors import CapacityError
from skyloom.models.memory import (
    HOST_BYTES,
    PHASE_PARTS,
    RUNGS,
    SLAB_BYTES,
    WORKSPACE_BYTES,
    Demand,
    FreeMemory,
    MemoryPlanner,
    ModelMemory,
    PartMemory,
    Weights,
    part_memory,
)

GB = 10**9
MEMORY = ModelMemory(
    parts={
        "text_encoder": PartMemory(Weights(5 * GB), Weights(GB // 5), 24),
        "transformer": PartMemory(Weights(5 * GB), Weights(GB // 8), 40),
        "autoencoder": PartMemory(Weights(GB // 2, fixed_bytes=GB // 2)),
    },
    text_bytes=GB // 4,
    condition_bytes=GB // 10,
    token_bytes=100_000,
    cached_token_bytes=200_000,
    decode_bytes=8_000,
    decoder_cache_bytes=4_000,
    encode_bytes=5_000,
    tile_pixels=2**16,
)
DEMAND = Demand(
    pixels=10**6,
    frames=100,
    tokens=20_000,
    cached_tokens=0,
    branches=2,
    parallel=1,
    calls=100,
    windows=1,
    pictures=False,
)
FRAMES = 3 * DEMAND.frames * DEMAND.pixels


def choose(device, host=10**12, *, memory=MEMORY, demand=DEMAND):
    return MemoryPlanner(memory, demand, FreeMemory(host, device)).choose()


def test_with_room_everything_stays_on_the_device():
    plan = choose(80 * GB)
    assert set(plan.rungs.values()) == {"resident"}
    assert plan.fits
    assert plan.seconds == 0
    weights = 10 * GB + 10 * GB + GB + GB // 2
    conditions = 2 * MEMORY.condition_bytes
    assert plan.device == {
        "text": weights + MEMORY.text_bytes + WORKSPACE_BYTES,
        "denoise": weights + conditions + 2 * GB + WORKSPACE_BYTES,
        "decode": weights + conditions + 12 * GB + WORKSPACE_BYTES,
    }
    assert set(plan.host.values()) == {HOST_BYTES + FRAMES}


def test_less_memory_takes_slower_rungs_and_never_more_than_is_free():
    chosen = {size: choose(size * GB) for size in (40, 30, 26, 18, 13, 11, 6)}
    assert chosen[30].rungs == {
        "text_encoder": "swapped",
        "transformer": "resident",
        "autoencoder": "resident",
    }
    assert chosen[26].rungs["text_encoder"] == "swapped"
    assert chosen[18].rungs["transformer"] == "swapped"
    assert chosen[13].rungs["transformer"] == "swapped"
    assert chosen[13].rungs["autoencoder"] == "tiled"
    assert chosen[11].rungs["transformer"] == "streamed"
    assert chosen[11].rungs["autoencoder"] == "tiled"
    assert chosen[6].rungs == {
        "text_encoder": "streamed",
        "transformer": "streamed",
        "autoencoder": "tiled",
    }
    seconds = [(plan.rungs["autoencoder"] == "tiled", plan.seconds) for plan in chosen.values()]
    assert seconds == sorted(seconds)
    for size, plan in chosen.items():
        assert plan.fits
        assert plan.device_peak <= size * GB
        plan.check()


def test_every_part_counts_where_it_lies():
    planner = MemoryPlanner(MEMORY, replace(DEMAND, pictures=True), FreeMemory(10**12, 6 * GB))
    plans = {tuple(plan.rungs[part] for part in RUNGS): plan for plan in planner.plans()}
    assert len(plans) == 4 * 3 * 3
    streamed = plans["streamed", "streamed", "swapped"]
    in_flight = 2 * (GB // 4)
    assert streamed.device["text"] == (
        2 * (2 * GB // 5) + in_flight + MEMORY.text_bytes + WORKSPACE_BYTES
    )
    decoder = GB + GB // 2
    assert streamed.device["encode"] == in_flight + decoder + 5 * GB + WORKSPACE_BYTES
    assert streamed.host["denoise"] - streamed.host["decode"] == decoder
    pinned = streamed.host["decode"] - HOST_BYTES - FRAMES
    assert 10 * GB < pinned <= 10 * GB * 9 / 8 + SLAB_BYTES
    assert pinned % SLAB_BYTES == 0
    on_host = plans["host", "resident", "resident"]
    assert on_host.host["text"] - on_host.host["decode"] == 10 * GB + MEMORY.text_bytes
    assert on_host.device["text"] == 10 * GB + decoder + WORKSPACE_BYTES
    tiled = plans["resident", "resident", "tiled"]
    assert tiled.host["decode"] - tiled.host["text"] == 8 * GB - decoder
    assert tiled.device["decode"] == (
        20 * GB + decoder + 12_000 * 2**16 + 2 * MEMORY.condition_bytes + WORKSPACE_BYTES
    )


def test_a_cache_of_keys_and_windows_that_wait_take_memory():
    one = choose(10**12).device
    longer = replace(DEMAND, cached_tokens=10_000, windows=3)
    more = choose(10**12, demand=longer).device
    kept = 2 * 200_000 * 10_000
    assert more["denoise"] - one["denoise"] == kept + 4_000 * DEMAND.pixels
    assert more["decode"] - one["decode"] == kept
    full = choose(10**12, demand=replace(DEMAND, itemsize=4)).device
    added = 10 * GB + 10 * GB + GB
    assert full["denoise"] - one["denoise"] == added + 2 * MEMORY.condition_bytes + 2 * GB


def test_weights_in_8_bits_are_half_the_size_and_multiplied_out_one_at_a_time():
    part = PartMemory(Weights(0, 5 * GB), Weights(0, GB // 8), 40, dequantized=10**8)
    quantized = replace(MEMORY, parts={**MEMORY.parts, "transformer": part})
    assert part.weights.bytes(2) == part.weights.bytes(4) == 5 * GB
    saved = choose(10**12).device["denoise"] - choose(10**12, memory=quantized).device["denoise"]
    assert saved == 5 * GB - 2 * 10**8 - 2**26


def test_a_cpu_has_one_memory():
    plan = MemoryPlanner(MEMORY, replace(DEMAND, parallel=2), FreeMemory(64 * GB)).choose()
    assert set(plan.rungs.values()) == {"resident"}
    assert plan.device_peak == 0
    on_device = choose(10**12, demand=replace(DEMAND, parallel=2)).device
    assert plan.host == {phase: size + FRAMES for phase, size in on_device.items()}
    small = MemoryPlanner(MEMORY, DEMAND, FreeMemory(26 * GB)).choose()
    assert small.rungs["text_encoder"] == "swapped"
    assert small.rungs["transformer"] == "resident"


def test_what_does_not_fit_is_refused_with_both_numbers():
    with pytest.raises(CapacityError, match=r"GPU memory must be at least 3\.\d GiB .*got 1\.9"):
        choose(2 * GB).check()
    with pytest.raises(CapacityError, match=r"host memory must be at least .* GiB .*got 0\.9 GiB"):
        choose(80 * GB, host=GB).check()
    with pytest.raises(CapacityError, match=r"smaller size or fewer frames.* 8 bits"):
        choose(GB).check()


def test_host_memory_decides_too():
    rich = choose(11 * GB)
    poor = choose(11 * GB, host=6 * GB)
    assert rich.fits
    assert not poor.fits  # nothing that is away from the device has a place
    assert poor.lacking < rich.host_peak


@pytest.mark.parametrize("phase", ["text", "denoise", "decode"])
def test_every_step_down_takes_less_until_there_is_none(phase):
    planner = MemoryPlanner(MEMORY, DEMAND, FreeMemory(10**12, 80 * GB))
    plan = planner.choose()
    seen = [plan]
    while (plan := planner.step_down(seen[-1], phase)) is not None:
        assert plan.device[phase] < seen[-1].device[phase]
        seen.append(plan)
    assert len(seen) > 3
    last = seen[-1]
    assert last.device[phase] == min(other.device[phase] for other in planner.plans())
    tiles = [one.rungs["autoencoder"] == "tiled" for one in seen]
    assert tiles == sorted(tiles)
    assert any(tiles) == (phase == "decode")
    assert last.rungs[PHASE_PARTS[phase]] != "resident"


def test_steps_down_keep_tiles_and_the_limit_of_the_host():
    free = FreeMemory(15 * GB, 80 * GB)
    planner = MemoryPlanner(MEMORY, DEMAND, free)
    plan = planner.choose()
    while (after := planner.step_down(plan, "decode")) is not None:
        plan = after
        assert plan.host_peak <= free.host
    assert plan.rungs["autoencoder"] == "tiled"
    after = planner.step_down(plan, "denoise")
    assert after is None or after.rungs["autoencoder"] == "tiled"


def test_plans_are_plain_values_and_words():
    plan = choose(11 * GB)
    values = plan.to_dict()
    assert values["rungs"]["transformer"] == "streamed"
    assert values["device_bytes"]["decode"] == plan.device["decode"]
    assert values["fits"] is True
    lines = list(plan.describe())
    assert lines[0] == "text encoder: layer by layer from its files through the device"
    assert lines[-2].startswith("GPU: ")
    assert "at most" in lines[-1]
    on_cpu = list(MemoryPlanner(MEMORY, DEMAND, FreeMemory(64 * GB)).choose().describe())
    assert [line.split(":")[0] for line in on_cpu] == ["host"]


def test_headers_of_files_become_sizes():
    shapes = {
        "blocks.0.a.weight": (10, 20),
        "blocks.0.a.bias": (10,),
        "blocks.1.a.weight": (10, 20),
        "blocks.1.a.bias": (10,),
        "encoder.block.0.layer.0.k.weight": (4, 4),
        "head.weight": (3, 5),
        "spiece_model": (1000,),
    }
    dtypes = dict.fromkeys(shapes, "BF16")
    dtypes["spiece_model"] = "U8"
    part = part_memory(shapes, dtypes)
    assert part == PartMemory(Weights(420 + 16 + 15), Weights(210), 3)
    dtypes["blocks.0.a.weight"] = "F8_E4M3"
    dtypes["blocks.1.a.weight"] = "Q8_0"
    eight = part_memory(shapes, dtypes, in_fp32=("head.",))
    assert eight.weights == Weights(20 + 16, 200 + 213 + 60)
    assert eight.block == Weights(10, 213)
    assert eight.dequantized == 200
