"""Bugs of the families that pipelines come in."""

from __future__ import annotations

from tests.bugs.mutant import Mutant

ENCODER, ADAPTERS = "fewstep/teachers/codecs.py", "fewstep/models/adapters.py"
PIXART, SANA, QWEN = (f"fewstep/teachers/{name}.py" for name in ("pixart", "sana", "qwen"))
OF_PIXART, OF_SANA, OF_QWEN = (f"tests/unit/teachers/test_{name}.py" for name in ("pixart", "sana", "qwen"))

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
)
