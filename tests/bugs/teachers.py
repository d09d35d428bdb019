"""Bugs of the families that pipelines come in, and of how foreign checkpoints are read."""

from __future__ import annotations

from tests.bugs.mutant import Mutant

ENCODER, ADAPTERS = "fewstep/teachers/codecs.py", "fewstep/models/adapters.py"
PIXART, SANA, QWEN = (f"fewstep/teachers/{name}.py" for name in ("pixart", "sana", "qwen"))
OF_PIXART, OF_SANA, OF_QWEN = (f"tests/unit/teachers/test_{name}.py" for name in ("pixart", "sana", "qwen"))
DIT, TESTS = "fewstep/teachers/dit.py", "tests/unit/teachers/test_dit.py"
Z_IMAGE, Z_TESTS = "fewstep/teachers/z_image.py", "tests/unit/teachers/test_z_image.py"
CONVERT = "fewstep/convert.py"
WAN, WAN_TESTS = "fewstep/teachers/wan.py", "tests/unit/teachers/test_wan.py"
TWO = "test_teacher_of_two_networks_samples_what_its_pipeline_samples"
SAMPLES = "test_teacher_samples_what_its_pipeline_samples"

MUTANTS = (
    Mutant(
        "pixart-mask",
        "teachers",
        "all 300 tokens are attended to",
        PIXART,
        'encoder_attention_mask=cond.tensors["mask"],',
        "encoder_attention_mask=None,",
        (f"{OF_PIXART}::test_teacher_samples_what_its_ddim_pipeline_samples",),
    ),
    Mutant(
        "pixart-variance",
        "teachers",
        "the learned variance is taken for the mean",
        PIXART,
        "output[:, : x.shape[1]]",
        "output[:, -x.shape[1] :]",
        (f"{OF_PIXART}::test_teacher_samples_what_its_ddim_pipeline_samples",),
    ),
    Mutant(
        "sana-mask",
        "teachers",
        "all 300 tokens are attended to",
        SANA,
        'encoder_attention_mask=cond.tensors["mask"],',
        "encoder_attention_mask=None,",
        (f"{OF_SANA}::test_teacher_samples_what_its_pipeline_samples",),
    ),
    Mutant(
        "sana-instructed",
        "teachers",
        "what guidance leads away from stands behind the instruction, too",
        SANA,
        "PipelineEncoder(instructed, negative=lambda prompt: encode(prompt, None))",
        "PipelineEncoder(instructed)",
        (
            f"{OF_SANA}::test_teacher_samples_what_its_pipeline_samples",
            f"{OF_SANA}::test_negative_prompt_is_encoded_without_the_instruction",
        ),
    ),
    Mutant(
        "encoder-remembers-by-prompt",
        "teachers",
        "a prompt that is asked for gets what guidance leads away from, if that is remembered",
        ENCODER,
        "self._known.pop((prompt, encode), None)",
        "next((row for (known, _), row in self._known.items() if known == prompt), None)",
        (f"{OF_SANA}::test_prompt_and_empty_prompt_are_told_apart",),
    ),
    Mutant(
        "sana-any-size",
        "teachers",
        "sizes are those of the VAE alone",
        SANA,
        "max(config.patch_size, STEP // scale)",
        "config.patch_size",
        (f"{OF_SANA}::test_size_that_its_pipeline_does_not_make_is_refused",),
    ),
    Mutant(
        "adapters-depthwise",
        "teachers",
        "depthwise convolutions get adapters, too",
        ADAPTERS,
        "isinstance(m, nn.Conv2d) and m.groups == 1",
        "isinstance(m, nn.Conv2d)",
        (f"{OF_SANA}::test_depthwise_layers_get_no_adapter",),
    ),
    Mutant(
        "qwen-plain-guidance",
        "teachers",
        "guided outputs keep their length",
        QWEN,
        "guided * (wanted / found.clamp_min(torch.finfo(found.dtype).tiny))",
        "guided",
        (
            f"{OF_QWEN}::test_teacher_samples_what_its_pipeline_samples",
            f"{OF_QWEN}::test_guided_patches_are_as_long_as_those_with_the_prompt",
        ),
    ),
    Mutant(
        "qwen-guidance-of-nothing",
        "teachers",
        "0 / 0",
        QWEN,
        "found.clamp_min(torch.finfo(found.dtype).tiny)",
        "found",
        (f"{OF_QWEN}::test_guidance_of_nothing_is_nothing",),
    ),
    Mutant(
        "qwen-padding",
        "teachers",
        "padding is attended to",
        QWEN,
        "encoder_hidden_states_mask=mask,",
        "encoder_hidden_states_mask=None,",
        (f"{OF_QWEN}::test_row_of_a_mixed_batch_is_what_it_is_alone",),
    ),
    Mutant(
        "qwen-moments",
        "teachers",
        "a picture's latents go to the VAE without its mean",
        "fewstep/teachers/wan.py",
        "(x * std + mean)",
        "(x * std)",
        (f"{OF_QWEN}::test_teacher_samples_what_its_pipeline_samples",),
    ),
    Mutant(
        "dit-drops-labels",
        "dit",
        "a student in training is shown no class in a tenth of its calls",
        DIT,
        "                part.dropout_prob = 0.0\n",
        "                pass\n",
        (f"{TESTS}::test_no_class_is_taken_away_in_training",),
    ),
    Mutant(
        "dit-variance",
        "dit",
        "the prediction of the variance is taken for that of the noise",
        DIT,
        "[:, : x.shape[1]]",
        "[:, -x.shape[1] :]",
        (f"{TESTS}::{SAMPLES}",),
    ),
    Mutant(
        "z-image-time",
        "z-image",
        "the network is told our time, at which 0 is data",
        Z_IMAGE,
        "        return 1 - t.float()\n",
        "        return t.float()\n",
        tuple(f"{Z_TESTS}::{test}" for test in ("test_time_and_flow_run_as_everywhere", SAMPLES)),
    ),
    Mutant(
        "z-image-sign",
        "z-image",
        "its output, x0 - eps, is taken for the flow",
        Z_IMAGE,
        "        return -torch.stack(made)",
        "        return torch.stack(made)",
        tuple(f"{Z_TESTS}::{test}" for test in ("test_time_and_flow_run_as_everywhere", SAMPLES)),
    ),
    Mutant(
        "z-image-padding",
        "z-image",
        "a prompt is given the zeros that fill it up to the longest",
        Z_IMAGE,
        "row[:length]",
        "row",
        (f"{Z_TESTS}::test_padding_between_prompts_is_not_seen", f"{Z_TESTS}::{SAMPLES}"),
    ),
    Mutant(
        "wan-boundary",
        "wan",
        "the boundary itself is the second network's",
        WAN,
        "[float(bound)]",
        "[pipe.config.boundary_ratio]",
        (f"{WAN_TESTS}::test_boundary_is_the_first_networks",),
    ),
    Mutant(
        "wan-experts",
        "wan",
        "the networks are exchanged",
        WAN,
        "return Experts(denoisers, ",
        "return Experts(denoisers[::-1], ",
        tuple(f"{WAN_TESTS}::{test}" for test in ("test_boundary_is_the_first_networks", TWO)),
    ),
    Mutant(
        "convert-storage",
        "convert",
        "a storage inside a pickle may hold another pickle, which is run",
        CONVERT,
        "weights_only=True",
        "weights_only=False",
        ("tests/unit/test_convert.py::test_what_it_would_call_is_not_called",),
    ),
    Mutant(
        "convert-imports",
        "convert",
        "names of a pickle are imported and called",
        CONVERT,
        'or type(name.rpartition(".")[2], (Inert,), {"name": full})',
        "or super().find_class(module, name)",
        ("tests/unit/test_convert.py::test_what_it_would_call_is_not_called",),
    ),
)
