"""Bugs of networks that lie in parts on several processes."""

from __future__ import annotations

from tests.bugs.mutant import Mutant

SHARDED = "tests/invariants/test_sharded.py"

MUTANTS = (
    Mutant(
        "network-is-one-unit",
        "fsdp",
        "a loss of features alone runs back through first layers that nobody has gathered again",
        "fewstep/models/sharding.py",
        "    found = [*_children(network), *(",
        "    found = [*(",
        (f"{SHARDED}::test_sharded_run_is_that_of_one_process[dmd2]",),
    ),
    Mutant(
        "base-divided-for-each-role",
        "fsdp",
        "every skeleton around the teacher's weights gets parts of its own",
        "fewstep/models/sharding.py",
        "            _put(network, name, parts.setdefault(key, network.get_parameter(name)))",
        "            parts[key] = network.get_parameter(name)",
        (f"{SHARDED}::test_each_process_holds_half[dmd2-lora]",),
    ),
    Mutant(
        "shards-unclipped",
        "fsdp",
        "the norm is that of tensors that hold no gradient, and nothing is clipped",
        "fewstep/training/trainer.py",
        "sharding.whole(torch.nn.utils.clip_grad_norm_(weights, clip))",
        "torch.nn.utils.clip_grad_norm_([getattr(p, '_local_tensor', p) for p in weights], clip)",
        (f"{SHARDED}::test_sharded_run_is_that_of_one_process[dmd2]",),
    ),
    Mutant(
        "parts-saved",
        "fsdp",
        "a checkpoint holds the main process's parts",
        "fewstep/training/state.py",
        "        full = whole(tensor)",
        "        full = getattr(tensor, '_local_tensor', tensor)",
        (f"{SHARDED}::test_sharded_run_goes_on_in_one_process",),
    ),
)
