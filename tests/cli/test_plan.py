"""`fewstep plan`."""

import json


def test_plan_prints_a_table_and_a_verdict(cli):
    done = cli("plan", "--teacher", "fashion-unet", "--method", "dmd2", "--batch-size", "4", "--gpu-memory", "24")
    assert done.exit_code == 0, done.output
    assert "generator's turn" in done.stdout and "fits into 24 GiB" in " ".join(done.stdout.split())


def test_plan_resolves_what_distill_would(cli):
    """The packaged recipe, under flags and --set."""
    flags = "--batch-size 8 --sharing lora --lora-rank 4 --precision bf16 --gradient-checkpointing --num-steps 2"
    done = cli(
        "plan", "--teacher", "fashion-unet", "--method", "dmd2", *flags.split(), "--set", "train.accumulate=2", "--json"
    )
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert "configs/fashion_unet_dmd2.yaml" in "".join(done.stderr.split())
    said = {k: figures[k] for k in ("sharing", "precision", "gradient_checkpointing", "micro_batch", "accumulate")}
    assert said == {
        "sharing": "lora", "precision": "bf16", "gradient_checkpointing": True, "micro_batch": 4, "accumulate": 2,
    }  # fmt: skip
    assert figures["turns"]["generator"]["calls"]["generator"] == 2 and figures["fits"] is None


def test_what_does_not_fit_ends_with_1_and_a_remedy(cli):
    done = cli("plan", "--teacher", "fashion-unet", "--method", "dmd2", "--gpu-memory", "1.1")
    assert done.exit_code == 1
    assert "with --gradient-checkpointing" in " ".join(done.stdout.split())


def test_mistakes_end_with_2_and_one_line(cli):
    for wrong, said in (
        (("--teacher", "sdx"), "Did you mean 'sdxl'"),
        (("--teacher", "mixture"), "no architecture of 'mixture'"),
        (("--teacher", "fashion-unet", "--resolution", "33"), "take 32"),
        (("--teacher", "fashion-unet", "--gpu-memory", "0"), "give the GiB"),
        (("--teacher", "fashion-unet", "--fsdp"), "give --gpus"),
    ):
        done = cli("plan", "--method", "dmd2", *wrong)
        assert done.exit_code == 2 and said in done.stderr and "Traceback" not in done.stderr
