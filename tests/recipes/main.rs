//! Recipes: the embedded ones, inheritance, overrides, and what a person reads after a mistake.

mod deit3;

use std::path::PathBuf;

use trencadis::recipe::load;
use trencadis::recipe::shapes::SHAPES;
use trencadis::recipe::{
    BlockKind, LossKind, ModelConfig, OptimizerKind, PackingKind, PoolKind, PositionCombination, Recipe,
    ScheduleKind,
};

fn load(name: &str, sets: &[&str]) -> trencadis::Result<Recipe> {
    Recipe::load(name, &sets.iter().map(|s| s.to_string()).collect::<Vec<_>>())
}

/// The message of the error that loading gives; mistakes of a person exit with 2.
fn mistake(name: &str, sets: &[&str]) -> String {
    let error = load(name, sets).expect_err("the recipe is wrong");
    assert_eq!(error.exit_code(), 2, "{error}");
    let message = error.to_string();
    assert!(!message.contains('\n'), "one sentence: {message}");
    message
}

fn file(folder: &tempfile::TempDir, name: &str, text: &str) -> String {
    let path: PathBuf = folder.path().join(name);
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

#[track_caller]
fn says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{message:?} does not say {part:?}");
    }
}

#[test]
fn every_embedded_recipe_loads_validates_and_round_trips() {
    let folder = tempfile::tempdir().unwrap();
    let list = load::list();
    assert!(list.len() > 15);
    for (name, description) in list {
        let recipe = load(name, &[]).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(recipe.description, description, "{name}");
        assert!(!description.is_empty() && !description.contains('\n'), "{name}");
        let text = recipe.to_toml().unwrap();
        let again = load(&file(&folder, "round.toml", &text), &[]).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(again, recipe, "{name}");
    }
}

#[test]
fn recipes_carry_the_published_settings() {
    let navit = load("navit-b16", &[]).unwrap();
    assert_eq!(navit.train.loss, LossKind::Sigmoid);
    assert_eq!(navit.train.schedule, ScheduleKind::Rsqrt);
    assert_eq!((navit.train.weight_decay, navit.train.head_weight_decay), (0.03, 3.0));
    assert_eq!((navit.packing.kind, navit.packing.sequence), (PackingKind::Bins, 256));
    assert_eq!((navit.drop.mean, navit.drop.max), (0.53, 0.9));
    assert_eq!((navit.resolution.min, navit.resolution.max), (64, 256));
    assert_eq!(navit.model.position.combination, PositionCombination::Sum);
    assert!(!navit.model.qkv_bias && !navit.model.norm_bias && !navit.model.proj_bias);

    let coarse = load("navit-b32", &[]).unwrap();
    assert_eq!((coarse.model.patch, coarse.packing.sequence), (32, 64));
    assert_eq!(coarse.train.lr, navit.train.lr, "inherited");

    let large = load("navit-l16", &[]).unwrap();
    // 4096 bins of 256 tokens a step, whatever fits a batch.
    assert_eq!(large.packing.tokens * large.train.accumulate, navit.packing.tokens * navit.train.accumulate);
    assert_eq!(navit.packing.tokens * navit.train.accumulate, 4096 * 256);

    let deit = load("deit3-h14", &[]).unwrap();
    assert_eq!((deit.model.layer_scale, deit.model.drop_path), (1e-4, 0.6));
    assert!(!deit.model.drop_path_linear && deit.model.pool == PoolKind::Cls);
    assert_eq!((deit.train.optimizer, deit.train.lr), (OptimizerKind::Lamb, 3e-3));

    for name in ["g14", "G14", "e14", "so400m14", "vit-22b", "vit-22b-b16", "vit-22b-l16"] {
        let train = load(name, &[]).unwrap().train;
        assert_eq!(
            (train.optimizer, train.beta1, train.beta2),
            (OptimizerKind::Adafactor, 0.9, 0.999),
            "{name}"
        );
        assert_eq!((train.beta2_power, train.clip), (0.8, 1.0), "{name}");
        assert_eq!((train.weight_decay, train.head_weight_decay), (0.03, 3.0), "{name}");
    }
    let big = load("vit-22b", &[]).unwrap();
    assert_eq!(big.model.block, BlockKind::Parallel);
    let d = big.model.dimensions().unwrap();
    assert_eq!((d.width, d.depth, d.mlp, d.heads, d.head_dim), (6144, 48, 24576, 48, 128));
    assert_eq!(load("vit-22b-l16", &[]).unwrap().model.dimensions().unwrap().head_dim, 64);
}

#[test]
fn shapes_give_dimensions_and_own_values_win() {
    for shape in SHAPES {
        let model = ModelConfig { shape: shape.name.into(), ..Default::default() };
        let d = model.dimensions().unwrap();
        assert_eq!((d.width, d.depth, d.mlp, d.heads), (shape.width, shape.depth, shape.mlp, shape.heads));
        assert_eq!(d.head_dim * d.heads, d.width, "{}", shape.name);
    }
    let own = ModelConfig { shape: "B".into(), depth: 3, heads: 5, head_dim: 40, ..Default::default() };
    let d = own.dimensions().unwrap();
    assert_eq!((d.width, d.depth, d.heads, d.head_dim), (768, 3, 5, 40));

    assert_eq!(d.kv_heads, 5, "every head has its own keys and values unless told otherwise");
    let grouped = ModelConfig { shape: "B".into(), kv_heads: 3, ..Default::default() };
    assert_eq!(grouped.dimensions().unwrap().kv_heads, 3);

    // 22B's published count is that of the encoder's matrices.
    let d = load("vit-22b", &[]).unwrap().model.dimensions().unwrap();
    assert_eq!(d.depth * (4 * d.width * d.width + 2 * d.width * d.mlp), 21_743_271_936);
}

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
fn sets_take_toml_and_bare_words_in_order() {
    let recipe = load(
        "navit-b16",
        &[
            "train.lr=3e-3",
            "train.lr=1",
            "train.steps = 100_000",
            "data.path=/data/set-{000..127}.tar",
            "model.position.combination=stack",
            "data.mean=[0.1, 0.2, 0.3]",
            "data.flip=false",
            "description=\"a = b\"",
        ],
    )
    .unwrap();
    assert_eq!((recipe.train.lr, recipe.train.steps), (1.0, 100_000));
    assert_eq!(recipe.data.path, "/data/set-{000..127}.tar");
    assert_eq!(recipe.model.position.combination, PositionCombination::Stack);
    assert_eq!(recipe.data.mean, [0.1, 0.2, 0.3]);
    assert!(!recipe.data.flip);
    assert_eq!(recipe.description, "a = b");
    // A path that looks like a number is still a path.
    assert_eq!(load("digits", &["data.path=2024"]).unwrap().data.path, "2024");
}

#[test]
fn mistakes_in_sets_name_the_key() {
    says(&mistake("digits", &["train.lrr=3"]), &["--set train.lrr=3", "no key `train.lrr`", "`train.lr`"]);
    says(&mistake("digits", &["lr=3"]), &["no key `lr`", "did you mean `train.lr`"]);
    says(&mistake("digits", &["modle.width=3"]), &["no key `modle`", "did you mean `model`"]);
    says(&mistake("digits", &["train.steps=many"]), &["`train.steps` must be an integer", "\"many\""]);
    says(&mistake("digits", &["train.steps=2.5"]), &["`train.steps` must be an integer", "float 2.5"]);
    says(&mistake("digits", &["train.steps=-2"]), &["`train.steps` must be at least 0", "-2"]);
    says(&mistake("digits", &["data.flip=yes"]), &["`data.flip` must be true or false", "\"yes\""]);
    says(&mistake("digits", &["data.mean=0.5"]), &["`data.mean` must be a list"]);
    says(&mistake("digits", &["data.mean=[true]"]), &["`data.mean`"]);
    says(&mistake("digits", &["model=3"]), &["`model` must be a section of keys"]);
    says(&mistake("digits", &["train.lr.x=3"]), &["`train.lr` must be a number", "a section of keys"]);
    says(
        &mistake("digits", &["model.pool=men"]),
        &["`model.pool` must be one of map, mean, cls", "did you mean \"mean\""],
    );
    says(&mistake("digits", &["train.lr"]), &["expected section.key=value"]);
    says(&mistake("digits", &["extends=navit-b16"]), &["no key `extends`"]);
}

#[test]
fn files_extend_names_and_files() {
    let folder = tempfile::tempdir().unwrap();
    file(&folder, "base.toml", "extends = \"navit-s16\"\n[train]\nsteps = 30000\nlr = 0.5\n");
    let path = file(&folder, "own.toml", "extends = \"base.toml\"\n[train]\nlr = 0.25\n");
    let recipe = load(&path, &[]).unwrap();
    assert_eq!((recipe.train.steps, recipe.train.lr), (30_000, 0.25));
    assert_eq!(recipe.model.shape, "S");
    // Without `extends` the defaults stand below.
    let alone = load(&file(&folder, "alone.toml", "[train]\nseed = 4\n"), &[]).unwrap();
    let mut expected = Recipe::default();
    expected.train.seed = 4;
    assert_eq!(alone, expected);
}

#[test]
fn mistakes_in_files_name_file_and_key() {
    let folder = tempfile::tempdir().unwrap();
    let wrong = |text: &str| mistake(&file(&folder, "r.toml", text), &[]);
    says(
        &wrong("[model.position]\nrow = 3\n"),
        &["r.toml: ", "`model.position.row`", "`model.position.rows`"],
    );
    says(&wrong("[model]\nwidth = \"wide\"\n"), &["r.toml: ", "`model.width` must be an integer"]);
    says(&wrong("[model]\nwidth = \n"), &["r.toml: line 2 is not valid TOML"]);
    says(&wrong("extends = [\"a\"]\n"), &["r.toml: `extends` must be the name or path of one recipe"]);
    says(&wrong("extends = \"navit\"\n"), &["r.toml: `extends`: there is no recipe `navit`"]);

    // The mistake is reported for the file that makes it, not for the one that extends it.
    file(&folder, "broken.toml", "[train]\nstep = 3\n");
    let message = wrong("extends = \"broken.toml\"\n");
    says(&message, &["broken.toml: ", "`train.step`", "`train.steps`"]);

    file(&folder, "a.toml", "extends = \"b.toml\"\n");
    let circle = mistake(&file(&folder, "b.toml", "extends = \"a.toml\"\n"), &[]);
    says(&circle, &["extend each other in a circle", "b.toml extends ", "a.toml"]);

    says(
        &mistake("navit-b61", &[]),
        &["no recipe `navit-b61`", "did you mean `navit-b16`", "trencadis recipes"],
    );
    says(&mistake("missing.toml", &[]), &["missing.toml", "no such recipe file"]);
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
fn rotary_keys_and_kv_heads_differ_where_they_have_an_effect() {
    let plain = load("navit-ti16", &[]).unwrap().model;
    let of = |sets: &[&str]| load("navit-ti16", sets).unwrap().model;
    let same = |a: &ModelConfig, b: &ModelConfig| assert_eq!(a.differences(b).unwrap(), [] as [String; 0]);
    same(&plain, &of(&["model.rope.theta=50", "model.kv_heads=3"]));
    let turned = of(&["model.rope.kind=halves"]);
    same(&turned, &of(&["model.rope.kind=halves", "model.rope.rows=3", "model.rope.max_frequency=8"]));
    assert_eq!(
        plain.differences(&turned).unwrap(),
        ["model.rope.kind is \"none\" there and \"halves\" here"]
    );
    let theta = of(&["model.rope.kind=halves", "model.rope.theta=50"]);
    assert_eq!(turned.differences(&theta).unwrap(), ["model.rope.theta is 10000.0 there and 50.0 here"]);
    let shared = of(&["model.kv_heads=1"]);
    assert_eq!(plain.differences(&shared).unwrap(), ["model.kv_heads is 3 there and 1 here"]);
}

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
