//! What is refused, each with one sentence that names the keys.

use super::{load, mistake, says};

#[test]
fn wrong_dimensions_name_what_would_do() {
    says(&mistake("navit-s16", &["model.shape=Li"]), &["model.shape `Li` is unknown", "So400m, H, H-52"]);
    says(&mistake("navit-s16", &["model.shape=so400"]), &["nearest: `So400m`"]);
    says(
        &mistake("navit-ti16", &["model.heads=5"]),
        &["model.heads = 5 does not divide model.width = 192", "4 and 6"],
    );
    says(
        &mistake("navit-s16", &["model.kv_heads=4"]),
        &["model.kv_heads = 4 does not divide model.heads = 6", "3 and 6", "0 takes as many"],
    );
    says(&mistake("navit-ti16", &["model.shape="]), &["model.width is 0", "model.shape is empty"]);
}

#[test]
fn values_that_do_not_fit_together_are_refused() {
    let cases: &[(&str, &[&str], &[&str])] = &[
        ("digits", &["packing.tokens=1000"], &["packing.tokens must be a positive multiple of 128", "1000"]),
        ("digits", &["packing.tokens=0"], &["packing.tokens"]),
        (
            "navit-b16",
            &["packing.sequence=300"],
            &["packing.sequence = 300 must divide packing.tokens = 32768"],
        ),
        ("navit-b16", &["packing.sequence=128"], &["256 tokens", "packing.sequence = 128"]),
        ("navit-b16", &["packing.open=0"], &["packing.open must be at least 1"]),
        ("digits", &["packing.tokens=128", "resolution.max=64"], &["256 tokens", "packing.tokens = 128"]),
        ("digits", &["model.patch=0"], &["model.patch must be at least 1"]),
        ("digits", &["model.channels=2"], &["model.channels must be 1 (grey) or 3 (RGB)"]),
        ("digits", &["resolution.min=40"], &["resolution.min = 40 must not exceed resolution.max = 32"]),
        ("digits", &["resolution.max=3"], &["resolution.max = 3 must be at least model.patch = 4"]),
        (
            "digits",
            &["resolution.kind=truncated-normal", "resolution.std=0"],
            &["resolution.std must be above 0"],
        ),
        ("digits", &["drop.mean=0.6"], &["drop.mean = 0.6 must lie between 0 and drop.max = 0.3"]),
        ("digits", &["drop.max=1"], &["drop.max must be at least 0 and below 1"]),
        ("digits", &["drop.kind=constant", "drop.mean=1"], &["drop.mean"]),
        (
            "navit-b16",
            &["drop.kind=resolution", "drop.min=0.03"],
            &["drop.min = 0.03, drop.max = 0.9 and drop.std = 0.02", "between 0 and 1"],
        ),
        ("navit-b16", &["drop.kind=resolution", "drop.max=0.96"], &["drop.max = 0.96"]),
        ("navit-b16", &["drop.kind=resolution", "drop.std=0"], &["drop.std = 0"]),
        (
            "navit-b16",
            &["drop.kind=resolution", "resolution.kind=fixed"],
            &["drop.kind = \"resolution\"", "resolution.kind = \"fixed\"", "\"constant\""],
        ),
        (
            "navit-b16",
            &["drop.kind=resolution", "resolution.min=256"],
            &["drop.kind = \"resolution\"", "resolution.min = 256 and resolution.max = 256"],
        ),
        (
            "navit-b16",
            &["drop.kind=resolution", "resolution.kind=native", "resolution.min=300"],
            &["resolution.min = 300 must not exceed resolution.max = 256"],
        ),
        (
            "navit-b16",
            &["drop.kind=schedule", "drop.min=0.8", "drop.max=0.2"],
            &["drop.min = 0.8 must not exceed drop.max = 0.2"],
        ),
        ("navit-b16", &["drop.kind=schedule", "drop.min=-0.1"], &["drop.min must be at least 0"]),
        ("navit-b16", &["drop.kind=schedule", "drop.max=1"], &["drop.max must be at least 0 and below 1"]),
        ("navit-b16", &["drop.kind=schedule", "drop.timescale=0"], &["drop.timescale", "but it is 0"]),
        ("navit-b16", &["drop.kind=schedule", "drop.midpoint=inf"], &["drop.midpoint"]),
        (
            "navit-b16",
            &["drop.kind=schedule", "resolution.kind=native"],
            &["drop.kind = \"schedule\"", "resolution.kind = \"native\"", "set drop.images"],
        ),
        (
            "navit-b16",
            &["packing.fit=resolution", "resolution.kind=fixed"],
            &["packing.fit = \"resolution\"", "resolution.kind = \"fixed\"", "packing.fit at \"none\""],
        ),
        (
            "navit-b16",
            &["packing.fit=drop", "drop.kind=none"],
            &["packing.fit = \"drop\"", "drop.kind = \"none\""],
        ),
        (
            "navit-b16",
            &["packing.fit=drop", "drop.kind=constant", "drop.max=1"],
            &["drop.max must be at least 0 and below 1"],
        ),
        (
            "digits",
            &["data.mean=[0.5, 0.25, 0.1]"],
            &["data.mean must hold 1 value", "holds 3", "set data.mean=[0.308]"],
        ),
        (
            "navit-b16",
            &["data.std=[0.1, 0.2]"],
            &["data.std must hold 1 value", "model.channels = 3", "holds 2"],
        ),
        ("digits", &["data.std=[0.0]"], &["data.std must be above 0"]),
        ("digits", &["data.validation=1"], &["data.validation must be at least 0 and below 1"]),
        ("digits", &["data.max_unreadable=2"], &["data.max_unreadable must lie in 0..1"]),
        ("digits", &["data.views=gpu"], &["data.views", "gpu", "device"]),
        ("digits", &["train.steps=0"], &["train.steps must be at least 1"]),
        ("digits", &["train.accumulate=0"], &["train.accumulate"]),
        ("digits", &["train.accumulate=65537"], &["train.accumulate must lie in 1..65536"]),
        ("digits", &["train.eps=1e-40"], &["train.eps", "1e-30"]),
        ("digits", &["train.lr=1e39"], &["train.lr", "single precision"]),
        ("digits", &["train.weight_decay=1e300"], &["train.weight_decay", "single precision"]),
        ("digits", &["packing.tokens=2147483648"], &["packing.tokens must be below 2^31"]),
        ("digits", &["packing.images=1000000"], &["packing.images = 1000000", "packing.tokens"]),
        ("digits", &["data.workers=1025"], &["data.workers must lie in 0..1024"]),
        ("digits", &["data.std=[1e-7]"], &["data.std must be above 0", "1e-6"]),
        (
            "digits",
            &["resolution.kind=truncated-normal", "resolution.std=11"],
            &["resolution.std", "at most 10"],
        ),
        ("digits", &["resolution.max=30001"], &["resolution.max must lie in 1..30000"]),
        ("digits", &["eval.resolution=3"], &["eval.resolution must be 0", "model.patch = 4"]),
        ("digits", &["model.width=1000001"], &["model.width must lie in 0..1000000"]),
        ("digits", &["model.depth=9223372036854775807"], &["model.depth must lie in 0..1000000"]),
        (
            "digits",
            &["model.width=1000000", "model.mlp=1000000", "model.depth=1000000"],
            &["parameters", "2^44"],
        ),
        (
            "digits",
            &["model.heads=1000000", "model.head_dim=1000000"],
            &["packing.tokens", "widest layer of 3000000000000"],
        ),
        ("digits", &["model.attention_scale=1e7"], &["model.attention_scale must lie in"]),
        ("digits", &["model.head_init_bias=-1e7"], &["model.head_init_bias must lie in"]),
        ("digits", &["model.position.columns=65536"], &["model.position.columns must lie in 1..65535"]),
        (
            "digits",
            &["model.position.basis=fourier", "model.width=63", "model.heads=1"],
            &["model.position.basis = \"fourier\" needs an even", "63"],
        ),
        ("digits", &["train.log_every=0"], &["train.log_every"]),
        ("digits", &["train.lr=0"], &["train.lr must be above 0"]),
        ("digits", &["train.lr=nan"], &["train.lr must be above 0"]),
        ("digits", &["train.lr_min=1"], &["train.lr_min = 1 must not exceed train.lr"]),
        ("digits", &["train.beta1=1"], &["train.beta1 must be at least 0 and below 1"]),
        ("digits", &["train.ema=1"], &["train.ema"]),
        ("digits", &["train.clip=-1"], &["train.clip must be at least 0"]),
        ("navit-b16", &["train.label_smoothing=0.1"], &["train.label_smoothing = 0.1 needs train.loss"]),
        ("digits", &["model.drop_path=1"], &["model.drop_path"]),
        ("digits", &["model.pool=cls"], &["model.pool = \"cls\" needs model.class_token = true"]),
        ("digits", &["model.norm_eps=0"], &["model.norm_eps must be above 0"]),
        ("digits", &["model.position.rows=0"], &["model.position.rows must lie in 1..65535"]),
        (
            "digits",
            &["model.position.combination=flat", "model.position.coordinate=fractional"],
            &["model.position.combination = \"flat\""],
        ),
        ("digits", &["model.rope.kind=half"], &["model.rope.kind", "halves"]),
        ("digits", &["model.rope.base=10"], &["`model.rope.base`"]),
        (
            "digits",
            &["model.rope.kind=halves", "model.head_dim=6"],
            &["model.rope turns pairs of columns", "a head dim", "that 4 divides, but it is 6"],
        ),
        (
            "digits",
            &["model.rope.kind=halves", "model.rope.theta=0.5"],
            &["model.rope.theta must lie in 1..1e12, but it is 0.5"],
        ),
        (
            "digits",
            &["model.rope.kind=halves", "model.rope.frequencies=turns"],
            &["model.rope.frequencies = \"turns\"", "need a model.rope.coordinate from -1 to 1"],
        ),
        (
            "digits",
            &[
                "model.rope.kind=halves",
                "model.rope.frequencies=linear",
                "model.rope.coordinate=ends",
                "model.rope.max_frequency=1",
            ],
            &["model.rope.max_frequency must lie in 2..10000, but it is 1"],
        ),
        (
            "digits",
            &["model.rope.kind=halves", "model.rope.coordinate=fractional", "model.rope.rows=0"],
            &["model.rope.rows must lie in 1..65535"],
        ),
        (
            "digits",
            &["model.position.basis=sinusoidal", "model.position.combination=stack", "model.width=126"],
            &["model.position.basis = \"sinusoidal\"", "126"],
        ),
    ];
    for (name, sets, parts) in cases {
        says(&mistake(name, sets), parts);
    }
}

/// Two descriptions of one network are one, whatever stands in keys that have no effect.
#[test]
fn mixing_and_teaching_that_contradict_themselves_are_refused() {
    let cases: &[(&[&str], &[&str])] = &[
        (&["mix.mixup=-1"], &["mix.mixup is the α", "must be 0 (off) or lie in 0.001..1000, but it is -1"]),
        (&["mix.cutmix=nan"], &["mix.cutmix"]),
        (&["mix.prob=1.5"], &["mix.prob must lie in 0..1, but it is 1.5"]),
        (&["mix.switch_prob=nan"], &["mix.switch_prob must lie in 0..1"]),
        (&["mix.cutmix=1", "mix.prob=0"], &["mix.prob = 0 mixes no image, but mix.cutmix = 1"]),
        (&["mix.binarise=true"], &["mix.binarise = true needs mixed images", "mix.mixup"]),
        (
            &["mix.mixup=1", "mix.binarise=true", "train.label_smoothing=0.1"],
            &["mix.binarise = true", "train.label_smoothing = 0.1"],
        ),
        (
            &["mix.mixup=1", "mix.binarise=true"],
            &["mix.binarise = true needs train.loss = \"bce\" or \"sigmoid\"", "sum to 1"],
        ),
        (&["mix.alpha=1"], &["no key `mix.alpha`"]),
        (&["distill.temperature=0"], &["distill.temperature must lie in 0.01..1000, but it is 0"]),
        (
            &["distill.teacher=runs/a", "distill.temperature=2", "distill.weight=0.5"],
            &["distill.temperature = 2", "distill.weight = 0.5"],
        ),
        (
            &["distill.store=logits", "packing.fit=resolution"],
            &["distill.store = \"logits\"", "with packing.fit what is seen"],
        ),
        (&["distill.weight=0"], &["distill.weight must be above 0 and at most 1, but it is 0"]),
        (
            &["distill.teacher=runs/a", "train.loss=sigmoid"],
            &["distill.teacher = \"runs/a\"", "train.loss = \"softmax\""],
        ),
        (
            &["distill.teacher=runs/a", "train.label_smoothing=0.1"],
            &["train.label_smoothing = 0.1", "distill.weight = 1"],
        ),
    ];
    for (sets, parts) in cases {
        says(&mistake("digits", sets), parts);
    }
    says(&mistake("deit3-b16", &["train.loss=softmax"]), &["mix.binarise", "train.loss"]);
    // What does not contradict itself.
    for sets in [
        &["mix.mixup=0.2", "train.label_smoothing=0.1"][..],
        &["mix.cutmix=1", "train.loss=sigmoid"],
        &["distill.teacher=runs/a", "distill.weight=0.5", "train.label_smoothing=0.1", "mix.mixup=0.8"],
    ] {
        load("digits", sets).unwrap();
    }
    let deit = load("deit3-l16", &[]).unwrap();
    assert_eq!((deit.mix.mixup, deit.mix.cutmix, deit.mix.binarise), (0.8, 1.0, true));
}

#[test]
fn keys_of_another_optimiser_are_refused() {
    for (optimizer, key, sentence) in [
        (
            "adamw",
            "nesterov=true",
            "train.nesterov = true is of train.optimizer = \"sgd\", but that is \"adamw\"; change one of them",
        ),
        (
            "lamb",
            "beta2_power=0.7",
            "train.beta2_power = 0.7 is of train.optimizer = \"adafactor\", but that is \"lamb\"; change one of them",
        ),
        (
            "adafactor",
            "eps=1e-6",
            "train.eps = 1e-6 has no part in train.optimizer = \"adafactor\": leave it at 1e-8, or use \"adamw\" or \"lamb\"",
        ),
        (
            "sgd",
            "beta2=0.95",
            "train.beta2 = 0.95 has no part in train.optimizer = \"sgd\", which keeps no second moments: leave it at 0.999, or \
             use another optimizer",
        ),
    ] {
        let message =
            mistake("vit-b16", &[&format!("train.optimizer=\"{optimizer}\""), &format!("train.{key}")]);
        assert_eq!(message, sentence);
    }
    let message = mistake("vit-b16", &["train.optimizer=\"sgd\"", "train.nesterov=true", "train.beta1=0"]);
    assert_eq!(message, "train.nesterov = true needs momentum, but train.beta1 is 0; change one of them");
    let message = mistake("vit-b16", &["train.optimizer=\"adafactor\"", "train.beta2_power=0"]);
    assert_eq!(message, "train.beta2_power must be above 0, but it is 0");
    load("vit-b16", &["train.optimizer=\"sgd\"", "train.nesterov=true"]).unwrap();
    load("vit-b16", &["train.optimizer=\"adafactor\"", "train.beta2=0.99", "train.beta2_power=1"]).unwrap();
    says(&mistake("vit-b16", &["train.optimizer=\"adam\""]), &["adam"]);
}
