"""A student that is an adapter as a LoRA file for the teacher's own pipeline, under diffusers' or kohya's names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fewstep.models.adapters import OWN, LoRA
from fewstep.teachers.base import Teacher
from fewstep.teachers.single import is_single

FILE = "pytorch_lora_weights.safetensors"
"""What diffusers calls it."""

Names = Literal["lora", "kohya"]
"""Whose names the tensors have: diffusers' own, or kohya-ss's, which most user interfaces read."""


def write_adapter(
    pipe: Any, teacher: Teacher, state: Mapping[str, Tensor], lora: LoRA, part: str, to: Path, names: Names
) -> str:
    """Save the LoRA file and the pipeline's scheduler.  Returns the lines that load both into the teacher's pipeline.

    pipe: the teacher's, with the student's scheduler.  state, lora: as `load_adapter` gives them.
    Raises ValueError for a student that is more than an adapter, for a pipeline that reads no LoRA file or has
    several networks, and for kohya's names where it is no UNet.
    """
    from diffusers.loaders.lora_base import LoraBaseMixin
    from safetensors.torch import save_file

    if not issubclass(type(pipe), LoraBaseMixin):
        raise ValueError(
            f"a {type(pipe).__name__} reads no LoRA files; export the student as a pipeline, whose weights hold it"
        )
    if teacher.student is not None:
        raise ValueError(
            f"this student starts from one of the networks of {teacher.card.name!r}, and a LoRA file would be read "
            "beside all of them; export it as a pipeline"
        )
    tensors = named(state, lora, part, names)  # before anything is written: it may refuse
    to.mkdir()
    save_file(tensors, to / FILE, metadata={"format": "pt"})
    pipe.scheduler.save_pretrained(to / "scheduler")
    scheduler = type(pipe.scheduler).__name__
    family, opened = _opened(pipe, teacher)
    return (
        f"from diffusers import {family}, {scheduler}\n\n"
        f"pipe = {family}.{opened}\n"
        f"pipe.load_lora_weights(folder, weight_name={FILE!r})\n"
        f'pipe.scheduler = {scheduler}.from_pretrained(folder, subfolder="scheduler")'
    )


def _opened(pipe: Any, teacher: Teacher) -> tuple[str, str]:
    """The class and the call that load the teacher's own pipeline."""
    card = teacher.card
    if is_single(card.source):
        config, _, commit = str(teacher.options["config"]).partition("@")
        family, how, source = type(pipe).__name__, "from_single_file", f"{card.source!r}, config={config!r}"
    else:
        family, how, source, commit = "DiffusionPipeline", "from_pretrained", repr(card.source), card.revision
    revision = f", revision={commit!r}" if commit else ""
    return family, f"{how}({source}{revision}, dtype=torch.float32)"


def named(state: Mapping[str, Tensor], lora: LoRA, part: str, names: Names) -> dict[str, Tensor]:
    """An adapter's tensors, float32, under a file format's names; B holds the scale, so that alpha is the rank.

    part: the pipeline's network, "unet" or "transformer".
    """
    if more := [name for name in state if name.startswith(f"{OWN}.")]:
        raise ValueError(f"this student has parts that are no adapter ({more[0]}); export it as a pipeline")
    scale = lora.alpha / lora.rank
    plain = {
        f"{part}.{name}": (value.float() * scale if ".lora_B." in name else value.float()).contiguous()
        for name, value in state.items()
    }
    if names == "lora":
        return plain
    if part != "unet":
        raise ValueError("kohya's names are for UNets here; use the format lora, which diffusers reads")
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

    return {_renamed(name): value for name, value in convert_state_dict_to_kohya(plain).items()}


def _renamed(name: str) -> str:
    """SDXL's embedding of sizes by the name in its first release: the only one under which diffusers finds it."""
    return name.replace("add_embedding_linear_1", "label_emb_0_0").replace("add_embedding_linear_2", "label_emb_0_2")
