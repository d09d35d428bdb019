"""The model cards README.md of the pipeline folders, rendered from the figures that the stages stored."""

from __future__ import annotations

import json
from pathlib import Path

from fewstep.teachers.fashion_build.loop import read_json, read_notes

DIT_HEAD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# fashion-dit

A text-to-image latent diffusion model in miniature, trained on Fashion-MNIST: 32x32 grey pictures of ten kinds of
clothing. It is the embedded teacher of fewstep: small enough for two CPU cores, yet a complete diffusers pipeline
(`CogView4Pipeline`: tokenizer, CLIP text encoder, VAE, transformer, flow scheduler).

```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("fewstep/teachers/weights/fashion-dit", dtype=torch.float32)
call = dict(num_inference_steps=50, guidance_scale={cfg:g}, max_sequence_length=16)
image = pipeline("a photo of an ankle boot", **call).images[0]
```

Prompts have at most 16 tokens. The captions it was trained on name one of: t-shirt, trousers, pullover, dress, coat,
sandal, shirt, sneaker, bag, ankle boot. Loading prints that the text encoder is not a GlmModel; it is meant to be so.
"""

UNET_HEAD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# fashion-unet

Stable Diffusion in miniature, trained on Fashion-MNIST: 32x32 grey pictures of ten kinds of clothing. It is the second
embedded teacher of fewstep: a complete `StableDiffusionPipeline` (tokenizer, CLIP text encoder, VAE, a UNet with
cross-attention that predicts eps, DDIM scheduler) with the usual betas, small enough for two CPU cores.

```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("fewstep/teachers/weights/fashion-unet", dtype=torch.float32)
image = pipeline("a photo of an ankle boot", num_inference_steps=50, guidance_scale={cfg:g}).images[0]
```

Prompts have at most 16 tokens. The captions it was trained on name one of: t-shirt, trousers, pullover, dress, coat,
sandal, shirt, sneaker, bag, ankle boot. Tokenizer, text encoder and VAE are those of fashion-dit, byte for byte.
"""

METRIC = """\
## Figures

FMD is the Frechet distance between 128 features of the shipped classifier over generated pictures and over the 60,000
training images. It is **not** an FID and not comparable with one. Agreement is the share of samples that the same
classifier assigns to the prompted class; the classifier itself is right on {accuracy:.2%} of the 10,000 test images.
Every figure was measured with the stored fp16 weights computed in fp32, on quantised 8-bit pictures, without retries:
sample i has noise from `torch.Generator("cpu").manual_seed(seed + i)` and the prompt of class i mod 10. FMD falls with
the number of samples (real test images: {few:.2f} for 2,000, {real:.2f} for 10,000), so only compare equal n.
The best CFG was chosen with 2,000 samples; its 10,000 samples have other seeds.

| pictures | steps | CFG | n | seed | FMD | agreement |
|---|---|---|---|---|---|---|
| test images | | | 10,000 | | {real:.3f} | {accuracy:.3f} |
| VAE reconstruction of the test images | | | 10,000 | | {vae:.3f} | |
"""


def _count(folder: Path) -> int:
    """Number of stored numbers in a safetensors file's header."""
    with folder.open("rb") as handle:
        header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    total = 0
    for name, entry in header.items():
        if name != "__metadata__":
            size = 1
            for length in entry["shape"]:
                size *= length
            total += size
    return total


def render_rows(rows: list[dict]) -> str:
    """The measured cells, most samples first, then most steps, as lines of a Markdown table."""
    ordered = sorted(rows, key=lambda row: (-row["n"], -row["steps"], row["cfg"]))
    line = "| teacher | {steps} | {cfg:g} | {n:,} | {seed} | {fmd:.3f} | {agreement:.3f} |\n"
    return "".join(line.format(**row) for row in ordered)


def render_recipe(out: Path, teacher: str) -> str:
    """Parameters, training cost and remarks of each part, from build.json."""
    folder, notes = out / teacher, read_notes(out, teacher)
    files = {
        "text": ("text encoder", folder / "text_encoder" / "model.safetensors"),
        "vae": ("VAE", folder / "vae" / "diffusion_pytorch_model.safetensors"),
        "dit": ("transformer", folder / "transformer" / "diffusion_pytorch_model.safetensors"),
        "unet": ("UNet", folder / "unet" / "diffusion_pytorch_model.safetensors"),
    }
    lines = ["| part | parameters | steps | minutes | peak learning rate |", "|---|---|---|---|---|"]
    for stage, note in notes.items():
        name, path = files[stage]
        minutes, rate = note["seconds"] / 60, note["peak_lr"]
        lines.append(f"| {name} | {_count(path):,} | {note['steps']:,} | {minutes:.1f} | {rate:g} |")
    remarks = [
        f"Remark on the {files[stage][0]}: {note['remark']}." for stage, note in notes.items() if "remark" in note
    ]
    return "\n".join([*lines, "", *remarks]) + "\n"


def best_guidance(rows: list[dict], steps: int) -> float | None:
    """The CFG of the lowest FMD at a step count, from the rows with the most samples; None without rows."""
    found = [row for row in rows if row["steps"] == steps]
    if not found:
        return None
    most = max(row["n"] for row in found)
    return min((row["fmd"], row["cfg"]) for row in found if row["n"] == most)[1]


DIT_DATA = """\
## Data and recipe

- Data: Fashion-MNIST (Zalando, MIT licence), 60,000 training images, 28x28 padded with black to 32x32; no
  augmentation. Captions: {captions} per class from templates; with probability 0.1 the empty prompt, which is the
  unconditional branch.
- Text encoder: 3-layer CLIP text model of width 64, contrastive loss against a small vision tower, all pairs of one
  class being positives; zero-shot accuracy {zero_shot:.2%} on the test images. The pipeline reads `hidden_states[-2]`.
- VAE: AutoencoderKL to 8x8x{channels}; |x - y| + (x - y)^2 + a perceptual distance on that vision tower (the part that
  VGG has in LPIPS; never the metric's classifier) + a KL term of weight 3e-6. The latents' mean and deviation over the
  training images are folded into the 1x1 convolutions, so scaling_factor is 1.
- Transformer: 6 blocks of width 128, patch 2; flow matching with x_t = (1 - t) x0 + t eps, logit-normal t, average of
  the weights; AdamW with warm-up and cosine decay over the time budget. fp32, two CPU cores shared with other work.
- Build: `python -m fewstep.teachers.fashion_build --stage all`. Budgets are minutes: another machine gets other steps.

"""

UNET_DATA = """\
## Data and recipe

- Data: Fashion-MNIST (Zalando, MIT licence), 60,000 training images, 28x28 padded with black to 32x32; no
  augmentation. Captions: {captions} per class from templates; with probability 0.1 the empty prompt, which is the
  unconditional branch.
- Text encoder and VAE (8x8x{channels} latents of unit variance, scaling_factor 1): see the card of fashion-dit.
  Zero-shot accuracy of the text encoder {zero_shot:.2%} on the test images. This pipeline reads its last_hidden_state.
- UNet: width 64 at 8x8, 96 with cross-attention at 4x4, one residual block per level. It predicts eps of
  x_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps on Stable Diffusion's 1,000 steps (betas "scaled_linear", 0.00085 to 0.012);
  uniform t, squared error weighted by min(SNR, 5) / SNR, average of the weights; AdamW with warm-up and cosine decay
  over the time budget. fp32, two CPU cores.
- sqrt(a_999) is 0.068: as in Stable Diffusion, the last step still holds a trace of the picture, while sampling starts
  from pure noise. The grid is "trailing", so that every number of steps starts at 999.
- Build: `python -m fewstep.teachers.fashion_build --stage all`. Budgets are minutes: another machine gets other steps.

"""

LICENCE = """
## Licence and limits

Weights: Apache-2.0. Data: Fashion-MNIST, MIT. The model knows ten words and one 32x32 grey style; prompts outside the
captions give arbitrary clothing. FMD barely notices memorised training images.
"""


def render_card(report: dict, out: Path) -> str:
    """The whole README.md.

    report: the content of teacher.json.  out: folder of the weights.
    """
    teacher = report["teacher"]
    head, recipe = {"fashion-dit": (DIT_HEAD, DIT_DATA), "fashion-unet": (UNET_HEAD, UNET_DATA)}[teacher]
    classifier = read_json(out / "fashion-classifier" / "card.json")
    text = read_notes(out, teacher)["text"]
    config = read_json(out / teacher / "vae" / "config.json")
    return "".join(
        (
            head.format(cfg=best_guidance(report["rows"], 50) or 1.5),
            "\n",
            METRIC.format(
                accuracy=classifier["test_accuracy"],
                few=classifier["fmd_of_the_first_2000_test_images"],
                real=classifier["fmd_of_the_10000_test_images"],
                vae=report["vae_reconstruction"]["fmd"],
            ),
            render_rows(report["rows"]),
            f"\nThe same figures with full precision and the protocol hash are in teacher.json "
            f"(`{report['protocol_hash'][:16]}`).\n\n",
            recipe.format(captions=10, zero_shot=text["zero_shot_accuracy"], channels=config["latent_channels"]),
            render_recipe(out, teacher),
            LICENCE,
        )
    )
