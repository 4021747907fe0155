"""What the papers claim, as trainings that differ in one thing each."""

from dataclasses import dataclass, field

# Square images of one size: what every Vision Transformer before NaViT was trained on.
SQUARE = ["resolution.kind=fixed", "resolution.aspect=square", "resolution.max=128"]
PLAIN = ["drop.kind=none", "model.drop_path=0"]
SIMPLE = [*SQUARE, "augment.crop=simple", "augment.three_augment=true", "augment.color_jitter=0.3"]
DEIT3 = [
    *SQUARE,
    "augment.crop=random-resized",
    "augment.three_augment=true",
    "augment.color_jitter=0.3",
    "mix.mixup=0.8",
    "mix.cutmix=1.0",
    "mix.binarise=true",
    "train.loss=bce",
    "train.label_smoothing=0",
    "train.optimizer=lamb",
    "train.lr=4e-3",
    "model.layer_scale=1e-4",
    "model.drop_path=0.05",
    "eval.crop=1.0",
]


@dataclass
class Arm:
    """One way to train: settings over the recipe, after another run's weights where `init` names an arm."""

    name: str
    sets: list
    init: str = ""
    # Steps, as a share of the question's.
    share: float = 1.0
    # Another arm that is this one's teacher.
    teacher: str = ""


@dataclass
class Question:
    """Arms that are compared, and at which resolutions."""

    name: str
    title: str
    claim: str
    arms: list
    resolutions: list = field(default_factory=lambda: [128])
    recipe: str = "photos"
    data: str = "photos"
    steps: int = 600


QUESTIONS = [
    Question(
        "navit",
        "NaViT against squares of one size, at equal compute",
        "NaViT (section 3): mixed resolutions, native aspect ratios and dropped tokens reach more in the same compute "
        "than squares of one size. Every step has the same token budget.",
        [
            Arm("squares of 128", SQUARE),
            Arm("native aspect ratio, 128", ["resolution.kind=fixed", "resolution.max=128"]),
            Arm("and mixed resolutions, 64 to 160", []),
            Arm("and tokens dropped, Beta of mean 0.4", ["drop.kind=beta", "drop.mean=0.4", "drop.max=0.7"]),
        ],
        resolutions=[64, 96, 128, 160],
    ),
    Question(
        "drop-schedule",
        "Schedules of token dropping",
        "NaViT (figure 8): a rate that falls over the images seen is better than a constant one, which is better than "
        "one that rises.",
        [
            Arm("constant, 0.5", ["drop.kind=constant", "drop.mean=0.5"]),
            Arm("falling, 0.8 to 0.2", ["drop.kind=schedule", "drop.min=0.2", "drop.max=0.8", "drop.timescale=-0.1"]),
            Arm("rising, 0.2 to 0.8", ["drop.kind=schedule", "drop.min=0.2", "drop.max=0.8", "drop.timescale=0.1"]),
            Arm("none", PLAIN),
        ],
    ),
    Question(
        "deit3",
        "DeiT III's recipe against a plain one",
        "DeiT III: 3-Augment, mixup and CutMix with binary cross-entropy, LAMB, LayerScale and stochastic depth make plain "
        "ViTs strong, in trainings of 400 to 800 epochs.",
        [Arm("plain: AdamW, flips, label smoothing", [*SQUARE, "eval.crop=1.0"]), Arm("DeiT III", DEIT3)],
    ),
    Question(
        "crop",
        "Simple random crop against random resized crop",
        "DeiT III (section 3.2): where data is plenty, the simple random crop, which keeps most of the image, is the better "
        "one; on ImageNet-1k alone the paper keeps the random resized crop.",
        [
            Arm("random resized crop", [*SIMPLE, "augment.crop=random-resized", "eval.crop=1.0"]),
            Arm("simple random crop", [*SIMPLE, "eval.crop=1.0"]),
        ],
    ),
    Question(
        "low-resolution",
        "Low resolution first, then fine-tuned, against full resolution",
        "DeiT III (section 3.3): training at a lower resolution and fine-tuning at the full one takes about half the time "
        "and memory, and reaches as much. Every step has 40 images.",
        [
            Arm("160 throughout", [*SQUARE, "resolution.max=160", "packing.images=40", "packing.tokens=4096"]),
            Arm("96 first", [*SQUARE, "resolution.max=96", "packing.images=40", "packing.tokens=1536"]),
            Arm(
                "96, then 160 for a tenth of the steps",
                [
                    *SQUARE,
                    "resolution.max=160",
                    "packing.images=40",
                    "packing.tokens=4096",
                    "train.lr=1e-4",
                    "train.warmup=5",
                ],
                init="96 first",
                share=0.1,
            ),
        ],
        resolutions=[160],
    ),
    Question(
        "blocks",
        "With and without QK-norm and biases",
        "ViT-22B (section 2): QK-norm is what keeps large models from diverging, and leaving out biases costs nothing.",
        [
            Arm("RMS QK-norm, no biases", []),
            Arm("no QK-norm, no biases", ["model.qk_norm=none"]),
            Arm("RMS QK-norm, biases", ["model.qkv_bias=true", "model.proj_bias=true", "model.norm_bias=true"]),
        ],
    ),
    Question(
        "distill",
        "Learning from a teacher",
        "ViT-22B (section 4.4.3): a small model that learns from a large one's probabilities is better than one that learns from "
        "the labels.",
        [
            Arm("the teacher: width 192", ["model.width=192", "model.mlp=768", "model.heads=3"], share=2.0),
            Arm("width 64, from labels", ["model.width=64", "model.mlp=256", "model.heads=1"]),
            Arm(
                "width 64, from the teacher",
                ["model.width=64", "model.mlp=256", "model.heads=1", "train.label_smoothing=0"],
                teacher="the teacher: width 192",
            ),
        ],
    ),
    Question(
        "cifar10",
        "CIFAR-10 from scratch, a plain ViT of 4 M parameters",
        "Public trainings of plain ViTs of 3 to 6 M parameters reach 80 % (it learns) to 91 % in 200 epochs (kentaroy47, "
        "omihub777, ViT-Lite), and 93 % and more with other networks.",
        [
            Arm(
                "ViT, patch 4, width 192, 9 blocks",
                [
                    "model.patch=4",
                    "model.width=192",
                    "model.depth=9",
                    "model.mlp=768",
                    "model.heads=3",
                    "model.position.rows=8",
                    "model.position.columns=8",
                    "resolution.kind=fixed",
                    "resolution.aspect=square",
                    "resolution.max=32",
                    "augment.crop=simple",
                    "train.weight_decay=0.05",
                ],
            )
        ],
        resolutions=[32],
        data="cifar10",
        steps=4000,
    ),
]
