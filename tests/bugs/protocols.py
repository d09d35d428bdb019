"""Bugs of figures by a protocol's name: the network that sees, the reference, and what a figure may be called."""

from __future__ import annotations

from tests.bugs.mutant import Mutant

INCEPTION, LOOK, KERNEL = (f"fewstep/metrics/{name}.py" for name in ("inception", "look", "kernel"))
PROTOCOLS, REFERENCE, FOLDER = (f"fewstep/metrics/{name}.py" for name in ("protocols", "reference", "image_folder"))
OF_INCEPTION, OF_PROTOCOLS, OF_REFERENCE, OF_FOLDER = (
    f"tests/unit/metrics/test_{name}.py" for name in ("inception", "protocols", "reference", "image_folder")
)

MUTANTS = (
    Mutant(
        "padding-counts",
        "protocols",
        "the mean counts padded zeros, as torch's does by default",
        INCEPTION,
        "count_include_pad=False",
        "count_include_pad=True",
        (f"{OF_INCEPTION}::test_pooling_is_that_of_the_graph",),
    ),
    Mutant(
        "mean-in-the-last-block",
        "protocols",
        "Mixed_7c takes the mean, as the paper has it and FID's graph has not",
        INCEPTION,
        '"Mixed_7c": ("max", BLOCK_8)',
        '"Mixed_7c": ("mean", BLOCK_8)',
        (f"{OF_INCEPTION}::test_pooling_is_that_of_the_graph",),
    ),
    Mutant(
        "corners-aligned",
        "protocols",
        "pictures are enlarged corner to corner",
        INCEPTION,
        "torch.tensor(length / size, dtype=torch.float32)",
        "torch.tensor((length - 1) / (size - 1), dtype=torch.float32)",
        (f"{OF_INCEPTION}::test_pixels_of_the_resize_are_read_without_half_a_pixel",),
    ),
    Mutant(
        "weights-run",
        "protocols",
        "a file of weights may run what its author liked",
        INCEPTION,
        "weights_only=True",
        "weights_only=False",
        (f"{OF_INCEPTION}::test_a_pickle_is_read_as_tensors_alone",),
    ),
    Mutant(
        "hash-believed",
        "protocols",
        "any file of the right name counts as the published one",
        "fewstep/metrics/weights.py",
        "digest.startswith(tuple(known)) if known else False",
        "bool(known)",
        (f"{OF_INCEPTION}::test_other_weights_are_refused_before_they_are_read",),
    ),
    Mutant(
        "unverified-fid",
        "protocols",
        "figures of other weights are called FID",
        PROTOCOLS,
        "    if not verified:\n",
        "    if verified is None:\n",
        (f"{OF_PROTOCOLS}::test_a_figure_has_its_published_name_only_where_it_is_that_figure",),
    ),
    Mutant(
        "fid-of-few",
        "protocols",
        "a figure of 5,000 samples has the name of one of 50,000",
        PROTOCOLS,
        "return name if n == protocol.count else",
        "return name if n else",
        (f"{OF_PROTOCOLS}::test_a_figure_has_its_published_name_only_where_it_is_that_figure",),
    ),
    Mutant(
        "hash-of-the-name",
        "protocols",
        "a protocol's settings may change under its hash",
        PROTOCOLS,
        "return protocol_hash(asdict(self))",
        'return protocol_hash({"name": self.name})',
        (f"{OF_PROTOCOLS}::test_every_field_changes_the_hash",),
    ),
    Mutant(
        "reference-runs",
        "protocols",
        "a reference is unpickled",
        REFERENCE,
        "allow_pickle=False",
        "allow_pickle=True",
        (f"{OF_REFERENCE}::test_odd_files_are_refused",),
    ),
    Mutant(
        "reference-of-other-weights",
        "protocols",
        "features of two networks of one name are compared",
        REFERENCE,
        'for key in ("name", "sha256", "resize"):',
        'for key in ("name",):',
        (f"{OF_REFERENCE}::test_features_of_another_network_are_refused",),
    ),
    Mutant(
        "reference-of-another-protocol",
        "protocols",
        "reals that were cropped otherwise are compared",
        REFERENCE,
        "    if made != protocol.hash:",
        "    if not made:",
        (f"{OF_REFERENCE}::test_a_reference_of_another_protocol_is_refused",),
    ),
    Mutant(
        "singular-covariance",
        "protocols",
        "as many samples as features pass, whose covariance is singular",
        REFERENCE,
        "not protocol.singular and n <= dim",
        "not protocol.singular and n < dim",
        (f"{OF_REFERENCE}::test_too_few_images_are_refused_where_the_covariance_must_be_regular",),
    ),
    Mutant(
        "one-rounding",
        "protocols",
        "every crop is rounded to even, where CMMD's goes down",
        FOLDER,
        'int(gap) if protocol.crop == "square-floor" else round(gap)',
        "round(gap)",
        (f"{OF_FOLDER}::test_another_rounding_and_filter_make_other_pictures",),
    ),
    Mutant(
        "cmmd-bandwidth",
        "protocols",
        "sigma is not squared",
        KERNEL,
        "(-2 * sigma**2)",
        "(-2 * sigma)",
        ("tests/unit/metrics/test_kernel.py::test_gaussian_distance_is_the_mean_over_all_pairs",),
    ),
    Mutant(
        "category-against-all",
        "protocols",
        "a category's samples are held against all reals",
        LOOK,
        "_frechet(Moments.of(seen.features[rows]), reference.parts[name])",
        "_frechet(Moments.of(seen.features[rows]), reference.whole)",
        ("tests/unit/metrics/test_look.py::test_categories_have_figures_of_their_own",),
    ),
)
