"""What a training iteration really takes on the CPU; run as a script it is one measured process.

    python -m tests.invariants.planned CONFIG.yaml

Prints [bytes by the allocator, bytes by the resident set] at the peak of an iteration of both turns, after a first one.
"""

import ctypes
import gc
import json
import sys
import tempfile
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from eval.memory import peak, prepared


def held(trainer) -> int:
    """Weights, buffers, averages and optimiser states, each storage once."""
    networks = [trainer.trio.real_score, trainer.ema.denoiser]
    networks += [network for players in trainer.players.values() for network in players.values()]
    tensors = [x for network in networks for x in (*network.parameters(), *network.buffers())]
    for optimizer in trainer.optimizers.values():
        tensors += [x for state in optimizer.state.values() for x in state.values()]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def allocated(trainer, iteration: int) -> int:
    """What is held, and the highest sum of the allocator's events of an iteration on top of it."""
    before = held(trainer)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        trainer.step(iteration)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(trace))
        return before + peak(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"])


def resident(trainer, iteration: int) -> int:
    """What is held, and by how much VmHWM rises above the resident set in an iteration."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    trainer.step(iteration)
    return held(trainer) + status("VmHWM") - before


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def main() -> None:
    """Each measure of an iteration of its own."""
    with prepared(Path(sys.argv[1]), []) as trainer:
        first = trainer.config.iterations - 3
        trainer.step(first)
        found = [allocated(trainer, first + 1), resident(trainer, first + 2)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
