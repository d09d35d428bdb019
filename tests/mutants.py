"""Known bugs, put in one by one: each must make the tests that guard against it fail.

python -m tests.mutants [NAME or TRAP ...]

A guard that nobody has seen fail proves nothing.  The tests run in a copy of the tree, first as it is and then with
each bug; only the copy is ever changed.  Exits 1 if a bug survives.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREE = ("fewstep", "fewstep_cuda", "tests", "configs", "eval", "pyproject.toml")
LIBRARIES = ("torch._dynamo", "accelerate", "diffusers", "peft", "transformers", "omegaconf", "pytest", "rich.progress")
"""Imported once and inherited by the forked processes that run pytest: this takes longer than most of the tests."""
LIMIT = 600
"""Seconds that one run of pytest may take."""
CRASHES = ("NameError", "TypeError", "AttributeError", "ImportError", "SyntaxError", "IndentationError")


@dataclass(frozen=True)
class Mutant:
    """old, once in file, becomes new; then at least one case of every one of `tests` must fail."""

    name: str
    trap: str
    bug: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


ADAPTERS = "tests/unit/models/test_adapters.py"
DENOISER = "tests/unit/models/test_denoiser.py"
TRIO = "tests/unit/models/test_trio.py"
GAN = "tests/unit/objectives/test_gan.py"
DMD2 = "tests/unit/objectives/test_dmd2.py"
TERMS = "tests/unit/objectives/test_terms.py"
ROLLOUT = "tests/unit/objectives/test_rollout.py"
TRAINER = "tests/unit/training/test_trainer.py"
TWO_RANKS = "tests/invariants/test_two_ranks.py::test_two_gloo_ranks_give_the_gradient_of_one_process"

SWITCHED = """
            mine = {n: m for n, m in role.backbone.module.named_modules() if n.endswith(("_A.default", "_B.default"))}
            role.backbone.register_forward_pre_hook(lambda *_: active.update(mine))
            for n, m in mine.items():
                m.forward = lambda x, n=n, m=m: x @ (m.weight + (active[n].weight - m.weight).detach()).T
            return role

        active: dict = {}
"""
"""Each layer takes the values of the role that was called last; the graph stays, so torch notices nothing."""

MUTANTS = (
    # -- gradient checkpointing recomputes a forward when another role was called last ---------------------------------
    Mutant(
        "adapters-switched-per-call",
        "recomputation",
        "layers are switched to a role's adapter before its forward: the recomputation runs with the last caller's",
        "fewstep/models/trio.py",
        "            add_lora(role.backbone.module, lora or LoRA(), seed=seed)\n            return role\n",
        "            add_lora(role.backbone.module, lora or LoRA(), seed=seed)" + SWITCHED,
        (f"{ADAPTERS}::test_recomputation_finds_the_right_adapter[False-dit-lora]",),
    ),
    # -- features are tapped by hooks ----------------------------------------------------------------------------------
    Mutant(
        "hooks-stay",
        "taps",
        "hooks outlive the forward and fire again in the recomputation",
        "fewstep/models/denoiser.py",
        "            handle.remove()",
        "            pass",
        (
            f"{ADAPTERS}::test_recomputation_finds_the_right_adapter[True-dit-lora]",
            f"{DENOISER}::test_taps_return_module_outputs_and_remove_their_hooks",
        ),
    ),
    Mutant(
        "last-call-wins",
        "taps",
        "a module that runs twice in one forward leaves the features of its last call",
        "fewstep/models/denoiser.py",
        "            if name in found:",
        "            if False:",
        (f"{DENOISER}::test_what_runs_twice_in_one_forward_cannot_be_tapped",),
    ),
    Mutant(
        "features-detached",
        "taps",
        "the hook keeps the features without their graph",
        "fewstep/models/denoiser.py",
        "output if isinstance(output, Tensor) else output[0]",
        "(output if isinstance(output, Tensor) else output[0]).detach()",
        (
            f"{GAN}::test_the_generators_turn_moves_neither_fake_score_nor_head",
            f"{GAN}::test_the_critics_turn_moves_head_and_own_features_but_nobody_else[fake]",
        ),
    ),
    Mutant(
        "input-tapped",
        "taps",
        "the hook keeps what goes into the module",
        "fewstep/models/denoiser.py",
        "found[name] = output if isinstance(output, Tensor) else output[0]",
        "found[name] = _inputs[0]",
        (f"{GAN}::test_a_tap_is_what_its_module_gave",),
    ),
    # -- who gets gradients from the GAN -------------------------------------------------------------------------------
    Mutant(
        "turn-freezes-nobody",
        "isolation",
        "fake score and head keep the gradient of the generator's GAN loss",
        "fewstep/models/trio.py",
        "p.requires_grad_(turn == name)",
        "p.requires_grad_(True)",
        (
            f"{GAN}::test_the_generators_turn_moves_neither_fake_score_nor_head",
            f"{TRIO}::test_only_the_named_player_requires_gradients_and_nobody_afterwards",
        ),
    ),
    Mutant(
        "turn-leaves-no-trace",
        "isolation",
        "parameters still require gradients after their turn",
        "fewstep/models/trio.py",
        "            for p in weights[name]:\n                p.requires_grad_(False)",
        "            pass",
        (f"{TRIO}::test_a_turn_ends_even_if_its_loss_raises", f"{TRAINER}::test_nothing_requires_grad_after_a_turn"),
    ),
    Mutant(
        "real-score-trusted",
        "isolation",
        "a real score that came trainable collects gradients",
        "fewstep/models/trio.py",
        "        self.real_score.requires_grad_(False)\n",
        "",
        (f"{TRIO}::test_a_turn_freezes_a_real_score_that_came_trainable",),
    ),
    Mutant(
        "critic-reaches-generator",
        "isolation",
        "the critic's samples carry the generator's graph",
        "fewstep/objectives/dmd2.py",
        "        with torch.no_grad():\n            x = self.rollout(",
        "        with torch.enable_grad():\n            x = self.rollout(",
        (f"{GAN}::test_the_critics_losses_reach_no_generator_whoever_trains",),
    ),
    Mutant(
        "generators-gan-detached",
        "isolation",
        "the generator's GAN loss is made of a detached sample and trains nothing",
        "fewstep/objectives/dmd2.py",
        'self.logits(trio, x, batch.cond, *self.noise(x, rng, "gan"))',
        'self.logits(trio, x.detach(), batch.cond, *self.noise(x, rng, "gan"))',
        (
            f"{GAN}::test_the_generators_turn_moves_neither_fake_score_nor_head",
            f"{GAN}::test_the_generators_gan_loss_by_hand",
        ),
    ),
    Mutant(
        "features-without-gradient",
        "isolation",
        "the head reads features made under no_grad, so the fake score learns nothing from the GAN",
        "fewstep/objectives/dmd2.py",
        "head(network(network.schedule.add_noise(x, eps, t), t, cond, taps=head.taps).taps)",
        "head(torch.no_grad()(network)(network.schedule.add_noise(x, eps, t), t, cond, taps=head.taps).taps)",
        (
            f"{GAN}::test_the_critics_turn_moves_head_and_own_features_but_nobody_else[fake]",
            f"{GAN}::test_the_generators_gan_loss_by_hand",
        ),
    ),
    Mutant(
        "teachers-features-ignored",
        "isolation",
        "the fake score learns from the GAN although the head was to read the teacher",
        "fewstep/objectives/dmd2.py",
        'trio.critic() if self.gan_features == "fake" else trio.real_score',
        "trio.critic()",
        (f"{GAN}::test_the_critics_turn_moves_head_and_own_features_but_nobody_else[teacher]",),
    ),
    # -- adapters: zero at the start, one a role, none on the teacher --------------------------------------------------
    Mutant(
        "b-starts-random",
        "adapters",
        "a new adapter changes the network: B is not zero",
        "fewstep/models/adapters.py",
        "LoraConfig(r=config.rank,",
        "LoraConfig(init_lora_weights=False, r=config.rank,",
        (f"{ADAPTERS}::test_new_adapters_change_nothing[dit]",),
    ),
    Mutant(
        "alpha-alone",
        "adapters",
        "the update is scaled by alpha and not by alpha / rank",
        "fewstep/models/adapters.py",
        "lora_alpha=config.alpha",
        "lora_alpha=config.alpha * config.rank",
        (f"{ADAPTERS}::test_an_adapter_adds_alpha_over_rank_times_ba",),
    ),
    Mutant(
        "merged-without-scale",
        "adapters",
        "B A is added to the exported weights without alpha / rank",
        "fewstep/models/adapters.py",
        "layer.get_delta_weight(ADAPTER).float()",
        "layer.get_delta_weight(ADAPTER).float() / layer.scaling[ADAPTER]",
        (f"{ADAPTERS}::test_merged_weights_give_the_adapters_outputs[dit]",),
    ),
    Mutant(
        "one-skeleton",
        "adapters",
        "teacher, generator and fake score are one network, and all run with its adapter",
        "fewstep/models/adapters.py",
        "return copy.deepcopy(module, {id(tensor)",
        "return module or copy.deepcopy(module, {id(tensor)",
        (
            f"{ADAPTERS}::test_an_adapter_changes_its_own_role_alone[dit]",
            f"{ADAPTERS}::test_a_run_leaves_no_trace_on_the_teacher",
        ),
    ),
    Mutant(
        "one-adapter",
        "adapters",
        "generator and fake score train one adapter",
        "fewstep/models/trio.py",
        'fake_score = full() if sharing == "copies" else adapted()',
        'fake_score = full() if sharing == "copies" else generator if sharing == "lora" else adapted()',
        (f"{ADAPTERS}::test_an_adapter_changes_its_own_role_alone[dit]",),
    ),
    Mutant(
        "teachers-weights-copied",
        "adapters",
        "every role holds the teacher's weights once more",
        "fewstep/models/adapters.py",
        "{id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}",
        "{}",
        (f"{ADAPTERS}::test_the_teachers_weights_exist_once[dit]",),
    ),
    Mutant(
        "average-shares-the-adapter",
        "adapters",
        "the averaged student is the student itself",
        "fewstep/models/denoiser.py",
        "for p in self.parameters() if id(p) not in own}",
        "for p in self.parameters() if own}",
        (
            f"{ADAPTERS}::test_averages_of_adapters_leave_the_shared_weights_alone",
            f"{ADAPTERS}::test_the_teachers_weights_exist_once[dit]",
        ),
    ),
    Mutant(
        "average-widens-the-teacher",
        "adapters",
        "the average turns the shared weights of a bf16 teacher into float32",
        "fewstep/models/ema.py",
        "        for p in self.denoiser.weights().values():\n            p.requires_grad_(False)",
        "        for p in self.denoiser.parameters():\n            p.requires_grad_(False)",
        (f"{ADAPTERS}::test_averages_of_adapters_leave_a_bf16_teacher_as_it_is",),
    ),
    Mutant(
        "shared-weights-train",
        "adapters",
        "a role with an adapter trains the teacher's weights too",
        "fewstep/models/denoiser.py",
        "return lora_weights(self.backbone.module) or dict(self.backbone.module.named_parameters())",
        "return dict(self.backbone.module.named_parameters())",
        (
            f"{ADAPTERS}::test_only_adapters_train",
            f"{ADAPTERS}::test_lora_fake_is_a_full_student_and_an_adapted_critic",
        ),
    ),
    Mutant(
        "adapters-unseeded",
        "adapters",
        "each process draws its own adapters",
        "fewstep/models/adapters.py",
        "        torch.manual_seed(seed)",
        "        torch.seed()",
        (f"{ADAPTERS}::test_adapters_start_from_their_seed_alone", f"{TWO_RANKS}[1-lora]"),
    ),
    # -- R1 ------------------------------------------------------------------------------------------------------------
    Mutant(
        "r1-without-sigma",
        "r1",
        "the squared difference is not divided by sigma^2",
        "fewstep/objectives/terms.py",
        ".square().mean() / sigma**2",
        ".square().mean()",
        (f"{GAN}::test_approximate_r1_is_the_squared_gradient", f"{GAN}::test_the_critics_gan_loss_by_hand"),
    ),
    Mutant(
        "r1-other-noise",
        "r1",
        "the shaken sample is re-noised to another level with other noise",
        "fewstep/objectives/dmd2.py",
        "self.logits(trio, shaken, cond, *noise)",
        'self.logits(trio, shaken, cond, *self.noise(shaken, rng, "gan.again"))',
        (f"{GAN}::test_r1_compares_at_one_noise",),
    ),
    Mutant(
        "r1-of-fakes",
        "r1",
        "the generator's sample is shaken in place of the real one",
        "fewstep/objectives/dmd2.py",
        "shaken = real + ",
        "shaken = x + ",
        (f"{GAN}::test_r1_compares_at_one_noise",),
    ),
    Mutant(
        "r1-rewarded",
        "r1",
        "R1 is subtracted: steep logits are rewarded",
        "fewstep/objectives/dmd2.py",
        "loss + self.r1_weight * r1",
        "loss - self.r1_weight * r1",
        (f"{GAN}::test_the_critics_gan_loss_by_hand",),
    ),
    Mutant(
        "r1-one-sided",
        "r1",
        "R1's clean logits are detached: a gradient of something else",
        "fewstep/objectives/dmd2.py",
        "approximate_r1(of_real, ",
        "approximate_r1(of_real.detach(), ",
        (f"{GAN}::test_the_critics_gan_loss_by_hand",),
    ),
    # -- the GAN's terms, samples and times ----------------------------------------------------------------------------
    Mutant(
        "generator-softplus-sign",
        "gan",
        "the generator makes its samples look fake",
        "fewstep/objectives/terms.py",
        "softplus(-_wide(fake_logits)).mean()",
        "softplus(_wide(fake_logits)).mean()",
        (f"{GAN}::test_gradients_of_the_terms_are_sigmoids", f"{GAN}::test_the_generators_gan_loss_by_hand"),
    ),
    Mutant(
        "critic-softplus-signs",
        "gan",
        "fake is positive in the critic's loss",
        "fewstep/objectives/terms.py",
        "softplus(-_wide(real_logits)).mean() + softplus(_wide(fake_logits)).mean()",
        "softplus(_wide(real_logits)).mean() + softplus(-_wide(fake_logits)).mean()",
        (
            f"{GAN}::test_gradients_of_the_terms_are_sigmoids",
            f"{GAN}::test_the_optimal_logit_is_the_log_ratio_of_noised_gaussians",
        ),
    ),
    Mutant(
        "real-and-fake-exchanged",
        "gan",
        "the critic's loss is given its logits in the wrong order",
        "fewstep/objectives/dmd2.py",
        "gan_critic(of_real, of_fake)",
        "gan_critic(of_fake, of_real)",
        (f"{GAN}::test_the_critics_gan_loss_by_hand",),
    ),
    Mutant(
        "generators-gan-subtracted",
        "gan",
        "the generator climbs its GAN loss",
        "fewstep/objectives/dmd2.py",
        "total + self.gan_weight * loss",
        "total - self.gan_weight * loss",
        (f"{GAN}::test_the_generators_gan_loss_by_hand",),
    ),
    Mutant(
        "one-noise-for-both",
        "gan",
        "real and generated samples are re-noised to one level with one noise",
        "fewstep/objectives/dmd2.py",
        '*self.noise(x, rng, "gan.fake")',
        "*noise",
        (f"{GAN}::test_real_fake_and_matching_have_times_of_their_own",),
    ),
    Mutant(
        "real-with-the-batchs-prompts",
        "gan",
        "real samples are told with the generator's prompts",
        "fewstep/objectives/dmd2.py",
        "real, cond = batch.real",
        "real, cond = batch.real[0], batch.cond",
        (f"{GAN}::test_real_samples_come_with_their_own_captions",),
    ),
    Mutant(
        "gan-start-off-by-one",
        "gan",
        "the generator is judged by a head that has not moved yet",
        "fewstep/objectives/dmd2.py",
        "rng.iteration > self.gan_start",
        "rng.iteration >= self.gan_start",
        (f"{GAN}::test_the_gan_waits_for_its_start",),
    ),
    Mutant(
        "head-unseeded",
        "gan",
        "each process draws its own head",
        "fewstep/models/discriminator.py",
        "            torch.manual_seed(seed)",
        "            torch.seed()",
        (
            "tests/unit/models/test_discriminator.py::test_a_probe_finds_the_features_and_seeds_the_weights[dit]",
            f"{TWO_RANKS}[2-gan]",
        ),
    ),
    # -- distribution matching -----------------------------------------------------------------------------------------
    Mutant(
        "score-difference-reversed",
        "matching",
        "the generator flees from the teacher",
        "fewstep_cuda/score_difference.py",
        "g = (fake_x0 - real_x0)",
        "g = (real_x0 - fake_x0)",
        (
            f"{TERMS}::test_autograd_of_the_loss_is_the_score_difference",
            f"{DMD2}::test_the_generators_gradient_is_the_score_difference_by_hand",
        ),
    ),
    Mutant(
        "scores-exchanged",
        "matching",
        "real and fake estimate are given in the wrong order",
        "fewstep/objectives/dmd2.py",
        "distribution_matching(x, real, fake,",
        "distribution_matching(x, fake, real,",
        (f"{DMD2}::test_the_generators_gradient_is_the_score_difference_by_hand",),
    ),
    Mutant(
        "one-normaliser-for-all",
        "matching",
        "samples share one denominator",
        "fewstep_cuda/score_difference.py",
        ".flatten(1).mean(1).clamp_min(floor)",
        ".mean().expand(len(x)).clamp_min(floor)",
        (f"{TERMS}::test_each_sample_has_its_own_normaliser",),
    ),
    Mutant(
        "subtracted-in-half-precision",
        "matching",
        "the difference is taken before the cast to float32",
        "fewstep_cuda/score_difference.py",
        "x, real_x0, fake_x0 = x.to(wide), real_x0.to(wide), fake_x0.to(wide)",
        "x, real_x0, fake_x0 = x.to(wide), real_x0.to(wide), fake_x0.to(real_x0.dtype).to(wide)",
        (f"{TERMS}::test_half_precision_inputs_are_subtracted_in_float32",),
    ),
    Mutant(
        "fake-score-guided",
        "matching",
        "classifier-free guidance is applied to the fake score too",
        "fewstep/objectives/dmd2.py",
        "fake = trio.critic()(x_t, t, batch.cond).x0",
        "fake = guided(trio.critic(), self.guidance)(x_t, t, batch.cond).x0",
        (
            f"{DMD2}::test_only_the_real_score_is_guided_and_both_branches_see_one_state",
            f"{DMD2}::test_the_generators_gradient_is_the_score_difference_by_hand",
        ),
    ),
    Mutant(
        "accumulation-ignored",
        "matching",
        "the known gradient is not scaled by what multiplies the loss",
        "fewstep/objectives/terms.py",
        "grad.mul_(grad_outputs[0].to(grad.dtype)), None, None",
        "grad, None, None",
        (f"{TERMS}::test_the_gradient_follows_what_multiplies_the_loss",),
    ),
    Mutant(
        "time-multiplies-columns",
        "matching",
        "one number per sample is broadcast along the width",
        "fewstep/diffusion/schedules.py",
        "    return value.view(-1, *[1] * (x.ndim - 1))\n",
        "    return value\n",
        ("tests/unit/diffusion/test_schedules.py::test_add_noise_is_per_sample_when_batch_equals_width",),
    ),
    # -- rollout, processes, resuming ----------------------------------------------------------------------------------
    Mutant(
        "rollout-keeps-its-prefix",
        "loop",
        "gradient flows through all steps of the rollout",
        "fewstep/objectives/rollout.py",
        "nullcontext() if next(calls) == step else torch.no_grad()",
        "nullcontext() if next(calls) <= step else torch.no_grad()",
        (f"{ROLLOUT}::test_only_the_last_step_has_gradient",),
    ),
    Mutant(
        "step-drawn-by-sample",
        "loop",
        "each process trains another step of the rollout",
        "fewstep/rng.py",
        'self._generator(stream, "shared")',
        "self._generator(stream, self._sample_ids[0])",
        (f"{ROLLOUT}::test_every_sample_and_every_rank_takes_the_same_step",),
    ),
    Mutant(
        "ranks-on-the-same-samples",
        "loop",
        "every process draws the first one's part of the batch",
        "fewstep/training/trainer.py",
        "iteration * self.config.batch_size + self.accelerator.process_index * size",
        "iteration * self.config.batch_size",
        (f"{TWO_RANKS}[1-plain]",),
    ),
    Mutant(
        "micro-batches-summed",
        "loop",
        "the loss is not divided by the number of micro-batches",
        "fewstep/training/trainer.py",
        "loss.total / self.config.accumulate",
        "loss.total",
        ("tests/invariants/test_accumulation.py",),
    ),
    Mutant(
        "average-lost-on-resume",
        "loop",
        "the average starts anew from the first weights",
        "fewstep/training/trainer.py",
        '        self.ema.denoiser.load(saved.tensors["ema"])\n',
        "",
        (f"{TRAINER}::test_network_that_draws_from_the_global_generator_resumes_exactly",),
    ),
    Mutant(
        "average-warms-up-again",
        "loop",
        "the average's count of updates is lost on resuming",
        "fewstep/training/trainer.py",
        '        self.ema.updates = saved.state["ema_updates"]\n',
        "",
        (f"{TRAINER}::test_network_that_draws_from_the_global_generator_resumes_exactly",),
    ),
    Mutant(
        "moments-lost-on-resume",
        "loop",
        "the optimisers start anew on resuming",
        "fewstep/training/trainer.py",
        "checkpoint.unpack_optimizer(self.optimizers[turn], tensors, ",
        "len(tensors), (",
        (f"{TRAINER}::test_network_that_draws_from_the_global_generator_resumes_exactly",),
    ),
    Mutant(
        "average-moves-every-iteration",
        "loop",
        "the critic's turns move the generator's average too",
        "fewstep/training/trainer.py",
        '            if turn == "generator":\n                self.ema',
        "            if True:\n                self.ema",
        (f"{TRAINER}::test_average_moves_only_after_generator_steps",),
    ),
)


def chosen(names: list[str]) -> list[Mutant]:
    """The mutants of these names and traps; all if none is given."""
    known = {mutant.name for mutant in MUTANTS} | {mutant.trap for mutant in MUTANTS}
    if odd := sorted(set(names) - known):
        raise SystemExit(f"no mutant or trap named {', '.join(odd)}; known: {', '.join(sorted(known))}")
    return [mutant for mutant in MUTANTS if not names or {mutant.name, mutant.trap} & set(names)]


def copy_of_tree(tree: Path) -> None:
    """What the tests need, in a folder of its own; its conftest refuses to test another tree than that."""
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree / name)
    with (tree / "tests" / "conftest.py").open("a") as conftest:
        conftest.write(f"\nimport fewstep, fewstep_cuda\nassert fewstep.__path__ == [{str(tree / 'fewstep')!r}]\n")
        conftest.write(f"assert fewstep_cuda.__path__ == [{str(tree / 'fewstep_cuda')!r}]\n")


def mutated(tree: Path, mutant: Mutant) -> str:
    """The file's text with the bug in it."""
    text = (tree / mutant.file).read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise SystemExit(
            f"{mutant.name}: {mutant.file} holds its old text {text.count(mutant.old)} times, not once; the code has "
            "moved, so bring the mutant up to date"
        )
    return text.replace(mutant.old, mutant.new)


def run_tests(tree: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """pytest's exit code and output, from a forked process in which `tree` is all there is of this project."""
    log = tree / "log.txt"
    process = multiprocessing.get_context("fork").Process(target=_pytest, args=(tree, tests, log))
    process.start()
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode is not None
    return process.exitcode, log.read_text(encoding="utf-8", errors="replace")


def _pytest(tree: Path, tests: tuple[str, ...], log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(tree)
    # COLUMNS: pytest would cut the lines that `verdict` reads.
    os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "400"}
    sys.path[:] = [str(tree)] + [path for path in sys.path if Path(path).resolve() != ROOT]
    sys.modules.pop("tests", None)  # the package of this file
    sys.exit(importlib.import_module("pytest").main(["-q", "-p", "no:cacheprovider", *tests]))


def verdict(code: int, log: str, tests: tuple[str, ...]) -> str:
    """ "caught" if every one of the tests failed, and by what it found: a bug that cannot run proves nothing."""
    failed = [line.removeprefix("FAILED ") for line in log.splitlines() if line.startswith("FAILED ")]
    if code not in (0, 1) or any(f" - {error}" in line for line in failed for error in CRASHES):
        return "CRASHED"
    passed = [t for t in tests if not any(line.startswith((f"{t} ", f"{t}[", f"{t}::")) for line in failed)]
    return "SURVIVED" if passed else "caught"


def main(names: list[str]) -> int:
    """Returns the exit code."""
    mutants = chosen(names)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as tests/conftest.py does, which comes after torch here
    sys.dont_write_bytecode = True  # two texts of one size within one second would share their bytecode
    for library in LIBRARIES:
        importlib.import_module(library)
    assert not {"fewstep", "fewstep_cuda"} & sys.modules.keys()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree, survivors, began = Path(folder).resolve(), 0, time.monotonic()
        copy_of_tree(tree)
        texts = [mutated(tree, mutant) for mutant in mutants]  # all, before any takes its time
        code, log = run_tests(tree, tuple(dict.fromkeys(test for mutant in mutants for test in mutant.tests)))
        if code:
            print(log, "the tests must pass before a bug is put in", sep="\n")
            return 2
        print(f"without a bug all pass ({time.monotonic() - began:.0f} s)", flush=True)
        for mutant, text in zip(mutants, texts):
            file, start = tree / mutant.file, time.monotonic()
            original = file.read_text(encoding="utf-8")
            file.write_text(text, encoding="utf-8")
            code, log = run_tests(tree, mutant.tests)
            file.write_text(original, encoding="utf-8")
            said, seconds = verdict(code, log, mutant.tests), time.monotonic() - start
            print(f"{said:8} {seconds:5.1f} s  {mutant.trap:13}  {mutant.name:29}  {mutant.bug}", flush=True)
            if said != "caught":
                survivors += 1
                print(log, *mutant.tests, "each of these had to fail", sep="\n")
        print(f"{len(mutants) - survivors} of {len(mutants)} caught in {time.monotonic() - began:.0f} s")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
