"""Plans: the tables and the layout that are known, constraints, what is solved and chosen, and what the command prints."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wan_dit.config import T2V_1_3B, T2V_14B, TI2V_5B, TINY, VACE_14B, DiTConfig
from wan_dit.plan import operations, parameters
from wan_train.cli import main
from wan_train.planning.advice import suggestions
from wan_train.planning.choose import choose
from wan_train.planning.degrees import Degrees, ways
from wan_train.planning.gpus import GPUS
from wan_train.planning.job import Bucket, Job
from wan_train.planning.memory import blocks_of, memory, shape_of, states
from wan_train.planning.plan import Plan
from wan_train.planning.policy import Wanted, hideable, spread
from wan_train.planning.saved import Kept, block_bytes, boundary_bytes
from wan_train.planning.timing import block_time, default_rates
from wan_train.planning.work import flops, forward_traffic, traffic

Captured = pytest.CaptureFixture[str]
HD, SD = Bucket((1280, 720), 81), Bucket((832, 480), 81)
GIB = 1 << 30


def plan_of(job: Job, degrees: Degrees, gpu: str = "h100", wanted: Wanted | None = None) -> Plan:
    return Plan(job, degrees, GPUS[gpu], default_rates(GPUS[gpu], job.precision), wanted or Wanted())


def told(capsys: Captured, *arguments: str) -> dict[str, Any]:
    assert main(["plan", "--json", *" ".join(arguments).split()]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


# the plain bf16 block of the table: 67 bytes a token and channel, 2 of them its input
@pytest.mark.parametrize(
    ("config", "bucket", "tokens", "tera", "share", "train", "kept", "dropped", "seconds"),
    [
        (T2V_1_3B, SD, 32_760, 283, 69.9, 849, 94, 2.8, 2.8),
        (T2V_1_3B, HD, 75_600, 1_250, 84.3, 3_749, 217, 6.5, 12.5),
        (TI2V_5B, Bucket((1280, 704), 121), 27_280, 517, 53.1, 1_551, 157, 4.7, 5.2),
        (T2V_14B, Bucket((256, 256), 1), 256, 8.4, 0.6, 25, 3.3, 0.1, 0.1),
        (T2V_14B, Bucket((336, 192), 81), 5_292, 154, 14.9, 461, 68, 2.0, 1.5),
        (T2V_14B, SD, 32_760, 1_678, 52.4, 5_035, 419, 12.5, 16.8),
        (T2V_14B, HD, 75_600, 6_523, 71.8, 19_570, 966, 28.8, 65.2),
        (T2V_14B, Bucket((16_000, 16_000), 1), 1_000_000, 843_529, 97.1, 2.53e6, 12_779, 382, 8_435),
    ],
)
def test_the_published_and_measured_table(
    config: DiTConfig, bucket: Bucket, tokens: int, tera: float, share: float, train: float, kept: float, dropped: float, seconds: float
) -> None:
    job = Job(config, (bucket,))
    assert job.count(bucket) == tokens
    found = flops(job, bucket)
    assert found.forward / 1e12 == pytest.approx(tera, rel=1e-2)  # the table leaves out the layers around the blocks
    assert found.model / 1e12 == pytest.approx(train, rel=2e-2)
    # the table's share is of scores and values of self-attention alone; that of the plan has cross-attention in it
    self_attention = 4 * tokens**2 * config.dim * config.num_layers
    assert 100 * self_attention / found.forward == pytest.approx(share, abs=0.06)
    assert operations(config, tokens).attention == pytest.approx(self_attention * (1 + 512 / tokens))
    shape, plain = shape_of(job, Degrees(), bucket), Kept(67, 0, boundary=2)
    rest = (8 * config.num_heads + 36) * tokens  # statistics, which the table leaves out
    assert config.num_layers * (block_bytes(job, shape, plain) - rest) / GIB == pytest.approx(kept, rel=2e-2)
    assert config.num_layers * boundary_bytes(job, shape, plain) / GIB == pytest.approx(dropped, rel=2e-3, abs=0.06)
    assert 4 * found.forward / 400e12 == pytest.approx(seconds, rel=1e-3, abs=0.06)


def test_the_report_needs_more_than_8_tb_at_a_million_tokens() -> None:
    job = Job(T2V_14B, (Bucket((16_000, 16_000), 1),))
    blocks = blocks_of(job, Degrees(), job.largest)
    assert 40 * blocks.block > 8e12
    assert 60 < blocks.block / 1e6 / 5120 < 80  # "gamma can exceed 60"


def test_the_layout_of_the_report(capsys: Captured) -> None:
    found = told(capsys, "--model wan2.1-t2v-14b --gpus 128 --ulysses 8 --ring 2 --fsdp 32")
    expected = {"gpus": 128, "ulysses": 8, "ring": 2, "fsdp": 32, "dp": 4, "data_ranks": 8, "global_batch": 8}
    assert expected.items() <= found["layout"].items()
    assert found["fits"]
    assert found["warnings"] == []
    states = sum(found["memory"][name] for name in ("parameters", "gradients", "optimiser"))
    assert states / GIB == pytest.approx(6.66, abs=0.01)  # 213 GiB over 32
    with_dp = told(capsys, "--model wan2.1-t2v-14b --gpus 128 --ulysses 8 --ring 2 --dp 4")
    assert with_dp["layout"] == found["layout"]


def test_traffic_of_a_block_in_the_report() -> None:
    job, degrees = Job(T2V_14B, (HD,)), Degrees(128, 8, 2, 32)
    sent = forward_traffic(job, degrees, HD)
    assert sent.ulysses / 1e6 == pytest.approx(169, abs=0.5)
    assert sent.ring / 1e6 == pytest.approx(97, abs=0.5)
    assert job.block_parameters * 2 * 31 / 32 / 1e6 == pytest.approx(681, abs=0.5)
    assert traffic(job, degrees, HD).ulysses == pytest.approx(2 * 40 * sent.ulysses)
    assert traffic(job, degrees, HD, recomputed=40).ulysses == pytest.approx(3 * 40 * sent.ulysses)
    one = block_time(job, degrees, HD, GPUS["h100"], default_rates(GPUS["h100"], "bf16"))
    assert one.computed == pytest.approx(0.0256, rel=0.02)  # 25 ms at 400 TFLOP/s
    assert one.ring < one.attention
    assert one.gather < one.computed


@pytest.mark.parametrize(("ring", "fsdp", "gpus"), [(1, 1, 1), (2, 8, 8), (2, 16, 64)])
def test_block_parameters_are_those_of_the_model(ring: int, fsdp: int, gpus: int) -> None:
    for config in (T2V_1_3B, T2V_14B, TI2V_5B, VACE_14B):
        job = Job(config, (SD if config is not TI2V_5B else Bucket((1280, 704), 121),))
        assert job.blocks * job.block_parameters + job.outside == parameters(config).total
        found = {term.name: term.size for term in states(job, Degrees(gpus, 1, ring, fsdp))}
        assert found["parameters"] == 4 * parameters(config).total // fsdp
    assert Job(T2V_14B, (SD,)).block_parameters == pytest.approx(351.3e6, rel=1e-3)


def test_fastvideo_612_is_told_to_run_out_of_memory(capsys: Captured) -> None:
    """14B at 512x512x81 on 8 H200 with 8 copies of the weights: 213 GiB of states on a GPU of 141 GB."""
    arguments = "--model wan2.1-t2v-14b --gpu h200 --gpus 8 --fsdp 1 --ulysses 1 --ring 1 --size 512x512 --frames 81"
    found = told(capsys, arguments)
    assert not found["fits"]
    states = sum(found["memory"][name] for name in ("parameters", "gradients", "optimiser"))
    assert states / GIB == pytest.approx(213, abs=0.5)
    sharded = next(offer for offer in found["suggestions"] if "--fsdp 8" in offer["what"])
    assert sharded["fits"]
    assert sharded["saves"] > 0.8 * states  # 7 of 8 shards go, but a window of gathered weights comes
    assert told(capsys, arguments.replace("--fsdp 1", "--fsdp 8"))["fits"]
    assert main(["plan", *arguments.split()]) == 0
    text = capsys.readouterr().out
    assert "does not fit: it would run out of memory" in text
    assert "the largest: optimiser 114.31 GB" in text
    assert "split the weights over 8 GPUs: --fsdp 8" in text


def test_suggestions_do_what_they_say() -> None:
    plan = plan_of(Job(T2V_14B, (SD,), micro_batch=2, ema=True), Degrees(8, 1, 1, 2))
    offers = suggestions(plan)
    assert not plan.fits
    assert [(not offer.fits, -offer.saves) for offer in offers] == sorted((not offer.fits, -offer.saves) for offer in offers)
    by_words = {offer.what.rpartition(": ")[2]: offer.saves for offer in offers}
    assert by_words["leave out --ema"] == pytest.approx(4 * parameters(T2V_14B).total / 2, rel=1e-6)
    assert by_words["--optimiser adamw8bit"] == pytest.approx((8 - 2.03125) * parameters(T2V_14B).total / 2, rel=1e-6)
    fewer = plan_of(Job(T2V_14B, (SD,), micro_batch=1, accumulate=2, ema=True), Degrees(8, 1, 1, 2))
    assert by_words["--micro-batch 1 --accumulate 2"] == plan.memory.total - fewer.memory.total


def test_a_14b_lora_fits_24_gb_with_blocks_swapped(capsys: Captured) -> None:
    arguments = "--model wan2.1-t2v-14b --gpu rtx4090 --size 512x512 --frames 33 --lora 32 --checkpointing full"
    assert not told(capsys, arguments)["fits"]
    assert not told(capsys, arguments, "--base", "fp8")["fits"]
    taken = {}
    for swapped in (20, 30, 40):
        found = told(capsys, arguments, "--base", "fp8", "--block-swap", str(swapped))
        taken[swapped] = found["memory"]["total"]
    assert found["fits"]
    assert taken[20] - taken[30] == pytest.approx(taken[30] - taken[40], abs=4)
    linear = parameters(T2V_14B).running + parameters(T2V_14B).context
    assert (taken[20] - taken[40]) / 20 == pytest.approx(parameters(T2V_14B).piece, rel=2e-3)
    assert found["memory"]["host"] == pytest.approx(linear, rel=2e-3)
    offers = told(capsys, arguments, "--base", "fp8")["suggestions"]
    swap = next(offer for offer in offers if "--block-swap" in offer["what"])
    assert swap["fits"]
    enough = int(swap["what"].rpartition(" ")[2])
    assert told(capsys, arguments, "--base", "fp8", "--block-swap", str(enough))["fits"]
    assert not told(capsys, arguments, "--base", "fp8", "--block-swap", str(enough - 1))["fits"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--gpus 8 --ulysses 8", "do not divide by Ulysses 8: use 2, 3, 4, 6, 12, and a ring for the rest (such as Ulysses 4 x Ring 2)"),
        ("--gpus 12 --ulysses 2 --ring 4", "12 GPUs do not divide by Ulysses 2 x Ring 4 = 8"),
        ("--gpus 8 --fsdp 3", "8 GPUs are no whole number of FSDP groups of 3: use one of 1, 2, 4, 8"),
        ("--gpus 24 --ulysses 4 --fsdp 6", "FSDP 6 must be a multiple or a divisor of Ulysses x Ring = 4"),
        ("--gpus 128 --fsdp 32 --dp 3", "128 GPUs are not DP 3 x FSDP 32"),
        ("--gpu h300", "no GPU named 'h300' (known: h100"),
        ("--size 833x480", "size 833x480 is not of multiples of 16x16"),
        ("--frames 80", "80 frames are not 1 + 4 k"),
        ("--base fp8", "8-bit weights and block swap are of a frozen base: give a LoRA rank too"),
        ("--lora 8 --block-swap 31", "block swap of 31: the model has 30 blocks"),
        ("--micro-batch 0", "micro_batch is 0, expected 1 or more"),
        ("--checkpointing most", "checkpointing 'most' is not one of auto, none, full or a number of blocks"),
        ("--checkpointing 31", "31 blocks to recompute and 0 to offload: the model has 30"),
        ("--bandwidth 400", "bandwidth '400' is not INSIDE,BETWEEN,PCIE"),
        ("--tflops fast", "tflops 'fast' is not a number"),
        ("--gamma -1", "gamma '-1' is not 'measure' or bytes"),
        ("--model wan9", "no backbone named 'wan9'"),
        ("--config tiny-vae", "plans are of transformers, and the objective of 'tiny-vae' is 'vae'"),
        ("--lora 8 --verify", "verify builds the layout of a model whose weights are all trained"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(arguments: str, message: str, capsys: Captured) -> None:
    assert main(["plan", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_padding_and_slow_layouts_are_told() -> None:
    assert "32,760 tokens are padded by 8 to divide by 16" in plan_of(Job(T2V_14B, (SD,)), Degrees(16, 8, 2, 16)).warnings()[0]
    assert "Ulysses 40 crosses machines" in plan_of(Job(T2V_14B, (SD,)), Degrees(40, 40, 1, 40)).warnings()[0]
    assert any(
        "communication will not hide" in each for each in plan_of(Job(T2V_14B, (Bucket((256, 256), 1),)), Degrees(8, 8, 1, 8)).warnings()
    )


def test_offload_comes_before_recomputation_where_it_hides() -> None:
    """14B at 720p over 16: 1.5 GiB and about 2.5 blocks of forward a transfer, so that one block of three is offloaded for nothing."""
    job, degrees, gpu = Job(T2V_14B, (HD,)), Degrees(64, 8, 2, 64), GPUS["h100"]
    rates = default_rates(gpu, "bf16")
    size = blocks_of(job, degrees, HD).block
    assert hideable(job, degrees, gpu, rates, size) == 40 // 3
    assert hideable(job, degrees, gpu, rates, 1.3 * size) == 0  # more than three blocks of forward
    plan = plan_of(job, degrees)
    assert plan.fits
    assert "recompute" not in plan.policy
    assert 0 < plan.policy.count("offload") <= 13
    assert plan.timing.exposed["offload"] == 0
    little_host = plan.changed(gpu=GPUS["rtx4090"].__class__(**{**vars(gpu), "host": 4_000_000_000}))
    assert little_host.fits
    assert little_host.policy.count("offload") == 2
    assert little_host.policy.count("recompute") > 0


@settings(deadline=None)
@given(room=st.integers(10, 140), heads=st.sampled_from([(1, 1), (2, 1), (4, 4)]))
def test_what_is_solved_is_the_cheapest_that_fits(room: int, heads: tuple[int, int]) -> None:
    gpu = GPUS["h100"].__class__(**{**vars(GPUS["h100"]), "memory": room * 10**9})
    plan = Plan(Job(T2V_1_3B, (SD,)), Degrees(96, heads[0], heads[1], 96), gpu, default_rates(gpu, "bf16"))
    policy = plan.policy
    assert len(policy) == 30
    if not plan.fits:
        return
    again, moved = policy.count("recompute"), policy.count("offload")
    for fewer in range(again):
        most = min(hideable(plan.job, plan.degrees, gpu, plan.rates, blocks_of(plan.job, plan.degrees, SD).block), 30 - fewer)
        assert memory(plan.job, plan.degrees, spread(30, fewer, most)).total > plan.room
    if moved:
        assert memory(plan.job, plan.degrees, spread(30, again, moved - 1)).total > plan.room


@given(blocks=st.integers(1, 60), data=st.data())
def test_policies_have_so_many_of_each(blocks: int, data: st.DataObject) -> None:
    again = data.draw(st.integers(0, blocks))
    moved = data.draw(st.integers(0, blocks - again))
    policy = spread(blocks, again, moved)
    assert (policy.count("recompute"), policy.count("offload"), len(policy)) == (again, moved, blocks)
    assert list(policy[again + moved :]) == ["keep"] * (blocks - again - moved)


@settings(deadline=None)
@given(gpus=st.integers(1, 96), heads=st.sampled_from([4, 12, 24, 40]))
def test_every_way_is_allowed(gpus: int, heads: int) -> None:
    found = list(ways(gpus, heads, 8, None, None, None))
    assert Degrees(gpus) in found
    assert len(set(found)) == len(found)
    for degrees in found:
        degrees.check(heads)
        assert degrees.dp * degrees.fsdp == gpus == degrees.data_ranks * degrees.context


def test_a_chosen_layout_is_the_fastest_that_fits() -> None:
    start = plan_of(Job(T2V_14B, (HD,)), Degrees(64))
    found = choose(start, None, None, None)
    assert found.fits
    others = [start.changed(degrees=degrees) for degrees in ways(64, 40, 8, None, None, None)]
    assert found.seconds_per_sample <= 1.01 * min(other.seconds_per_sample for other in others if other.fits)
    assert choose(start, 4, None, 64).degrees.ulysses == 4
    assert choose(plan_of(Job(T2V_1_3B, (Bucket((256, 256), 1),)), Degrees(8)), None, None, None).degrees.context == 1
    nothing = choose(plan_of(Job(T2V_14B, (HD,)), Degrees(2), "rtx4090"), None, None, None)
    assert not nothing.fits


def test_every_setting_counts(capsys: Captured) -> None:
    base = told(
        capsys,
        "--gpus 8 --ulysses 2 --ring 1 --fsdp 8 --checkpointing none --size 832x480 --frames 33",
    )

    def other(*arguments: str) -> dict[str, Any]:
        return told(
            capsys,
            "--gpus 8 --ulysses 2 --ring 1 --fsdp 8 --size 832x480 --frames 33 --checkpointing",
            *arguments,
        )

    total = base["memory"]["total"]
    assert other("full")["memory"]["total"] < other("15")["memory"]["total"] < total
    assert other("full")["flops"]["run"] > base["flops"]["run"]
    assert other("full")["flops"]["model"] == base["flops"]["model"]
    assert other("none", "--offload-activations")["memory"]["host"] > 0.9 * base["memory"]["blocks"]
    assert other("none", "--precision", "autocast")["memory"]["copies"] > 0
    assert other("none", "--precision", "fp32")["memory"]["blocks"] > 1.4 * base["memory"]["blocks"]
    assert other("none", "--micro-batch", "2")["layout"]["global_batch"] == 2 * base["layout"]["global_batch"]
    assert other("none", "--ema")["memory"]["ema"] == base["memory"]["parameters"]
    assert other("none", "--gamma", "40")["memory"]["blocks"] < 0.5 * base["memory"]["blocks"]
    assert other("none", "--tflops", "800")["seconds"]["compute"] == pytest.approx(base["seconds"]["compute"] * 395.6 / 800)
    assert other("none", "--memory", "8GB")["fits"] is False
    assert other("none", "--bandwidth", "1,1,1")["seconds"]["step"] > base["seconds"]["step"]
    assert other("none", "--offload-activations", "--host-memory", "16GB", "--memory", "200GB")["fits"] is False


def test_the_record_keeps_its_form(capsys: Captured) -> None:
    found = told(capsys, "--model", "tiny", "--gpus", "2", "--memory", "1GB")
    assert list(found) == [
        "name", "chosen", "gpu", "layout", "parameters", "trained", "buckets", "memory", "fits", "policy", "flops", "traffic",
        "seconds", "rates", "mfu", "warnings", "suggestions", "together", "verified",
    ]  # fmt: skip
    assert list(found["layout"]) == ["gpus", "ulysses", "ring", "fsdp", "dp", "data_ranks", "micro_batch", "accumulate", "global_batch"]
    assert list(found["memory"]) == [
        "total", "room", "host", "parameters", "base", "gradients", "optimiser", "ema", "window", "copies", "blocks", "backward",
        "offload", "context", "around", "runtime",
    ]  # fmt: skip
    assert sum(size for name, size in found["memory"].items() if name not in ("total", "room", "host")) == found["memory"]["total"]
    assert list(found["seconds"]) == ["step", "compute", "optimiser", "exposed", "per_sample"]
    assert found["chosen"]
    assert not found["fits"]
    assert set(found["suggestions"][0]) == {"what", "saves", "fits", "slower"} if found["suggestions"] else True


def test_recipes_are_planned(flow_toml: Any, capsys: Captured) -> None:
    found = told(capsys, "--config", str(flow_toml), "precision=bf16")
    assert found["name"] == "micro"
    assert found["buckets"] == [{"size": [16, 16], "frames": 5, "share": 1.0, "tokens": 2}]
    assert found["layout"]["global_batch"] == 2
    assert found["memory"]["ema"] == 4 * found["parameters"]
    assert found["memory"]["copies"] > 0
    assert found["policy"] == ["keep"]
    split = told(capsys, "--config", "tiny-t2v", "stages=[]", "parallel.fsdp=4", "memory.policy=recompute", "micro_batch=2")
    assert {"gpus": 4, "fsdp": 4, "micro_batch": 2, "accumulate": 2, "global_batch": 16}.items() <= split["layout"].items()
    assert split["policy"] == ["recompute"] * TINY.num_layers
    assert split["memory"]["gradients"] == split["parameters"] + 4 * split["parameters"]  # of a shard, and whole until the last turn
    replaced = told(capsys, "--config", "tiny-t2v", "stages=[]", "--size", "128x64", "--optimiser", "adamw", "--checkpointing", "auto")
    assert replaced["buckets"][0]["size"] == [128, 64]
    assert replaced["memory"]["optimiser"] == 8 * replaced["parameters"]


def test_a_recipe_with_stages_is_planned_for_its_heaviest(flow_toml: Any, capsys: Captured) -> None:
    shapes = '[{name="a",until=3,video=[16,16],frames=[1]},{name="b",until=6,video=[32,48],frames=[5,9],tokens=40,batch_size=8}]'
    found = told(capsys, "--config", str(flow_toml), f"stages={shapes}")
    assert found["buckets"] == [{"size": [48, 32], "frames": 9, "share": 1.0, "tokens": 18}]
    assert (found["layout"]["micro_batch"], found["layout"]["accumulate"]) == (2, 4), "what 40 tokens hold"


def test_help_and_plans_import_no_torch() -> None:
    code = "import sys; from wan_train.cli import main\n{}\nassert 'torch' not in sys.modules, 'torch was imported'"
    help_ = "try: main(['plan', '--help'])\nexcept SystemExit: pass"
    plan = "main(['plan', '--model', 'wan2.1-t2v-14b', '--gpus', '16'])"
    for body in (help_, plan, "main(['plan', '--config', 'tiny-t2v'])"):
        subprocess.run([sys.executable, "-c", code.format(body)], check=True, stdout=subprocess.DEVNULL)
