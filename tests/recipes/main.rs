//! Recipes: the embedded ones, inheritance, overrides, and what a person reads after a mistake.

mod deit3;
mod refused;

use std::path::PathBuf;

use trencadis::recipe::load;
use trencadis::recipe::shapes::SHAPES;
use trencadis::recipe::{
    BlockKind, LossKind, ModelConfig, OptimizerKind, PackingKind, PoolKind, PositionCombination, Recipe,
    Recompute, ScheduleKind,
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
fn recipes_of_earlier_versions_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let of = |text: &str| load(&file(&folder, "old.toml", text), &[]).unwrap().model.recompute;
    assert_eq!(of("extends = \"digits\"\n[model]\ncheckpoint = true"), Recompute::Full);
    assert_eq!(of("extends = \"vit-22b\"\n[model]\ncheckpoint = false"), Recompute::None);
    assert_eq!(load("digits", &["model.checkpoint=true"]).unwrap().model.recompute, Recompute::Full);
    assert_eq!(load("digits", &["model.recompute=selective"]).unwrap().model.recompute, Recompute::Selective);
    let written = load("vit-22b", &[]).unwrap().to_toml().unwrap();
    assert!(written.contains("recompute = \"full\"") && !written.contains("checkpoint"));
    // Both say two things.
    let both = file(&folder, "both.toml", "[model]\ncheckpoint = true\nrecompute = \"none\"");
    says(&mistake(&both, &[]), &["there is no key `model.checkpoint`"]);
    says(&mistake("digits", &["model.checkpoint=3"]), &["there is no key `model.checkpoint`"]);
    says(
        &mistake("digits", &["model.recompute=selectiv"]),
        &["`model.recompute` must be one of none, selective, full", "did you mean \"selective\"?"],
    );
}
