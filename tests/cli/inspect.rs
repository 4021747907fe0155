//! `trencadis inspect`, `recipes` and the help.

use super::*;

#[test]
fn data_in_text_json_and_as_a_picture() {
    let place = Place::new();
    place.run("inspect data").succeeds().says(&[
        "built-in digits, validation: automatic split of 20 %, seed 0",
        "1438 to train on, 359 to validate",
        "not square",
        "padding",
    ]);
    let json = place.run("inspect data --json").succeeds().out;
    let report: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert!(report.as_object().unwrap().len() > 3, "{json}");

    let by_resolution = "--set drop.kind=resolution --set drop.min=0.25 --set drop.max=0.75";
    place.run(&format!("inspect data {by_resolution}")).succeeds().says(&[
        "drop rate",
        "  12 pixels",
        "  25.0 %\n",
        "  32 pixels",
        "  75.0 %\n",
    ]);
    let falling = "--set drop.kind=schedule --set drop.min=0 --set drop.max=0.5 --set drop.images=1000";
    place.run(&format!("inspect data {falling}")).succeeds().says(&[
        "  after 0   ",
        "  49.7 %\n",
        "  after 500 ",
        "  25.0 %\n",
        "  after 1000 ",
        "   0.3 %\n",
    ]);
    assert!(!place.run("inspect data").succeeds().out.contains("drop rate"));

    place.photos("photos", 10);
    place.run("inspect data photos --preview deep.png").succeeds().says(&["classes     2"]);
    let drawn = image::open(place.path("deep.png")).unwrap().into_rgb8();
    let colours: std::collections::HashSet<_> = drawn.pixels().map(|p| p.0).collect();
    assert!(drawn.width() > 100 && drawn.height() > 50 && colours.len() > 20, "something is drawn");
    let failed = place.run("inspect data photos --preview absent/x.png");
    assert_eq!(failed.code, Some(2));
    assert_eq!(failed.err.lines().count(), 1, "{}", failed.err);
    assert!(failed.err.contains("absent/x.png"));
}

#[test]
fn augmentation_as_a_picture() {
    let place = Place::new();
    place.photos("photos", 10);
    place.run("inspect augment deit3-s16 --data photos --out seen.png").succeeds();
    let drawn = image::open(place.path("seen.png")).unwrap().into_rgb8();
    assert!(drawn.width() > 1000 && drawn.height() > 500);
    place.run("inspect augment --out absent/x.png").refuses(&["absent/x.png"]);
    place.run("inspect augment --out seen.jpg").refuses(&["--out", "seen.jpg", ".png"]);
    place.run("inspect augment --set augment.crop=simple").refuses(&["augment.crop", "resolution.aspect"]);
}

#[test]
fn models_and_their_graphs() {
    let place = Place::new();
    place.run("inspect model vit-b16 --classes 1000").succeeds().says(&[
        "width 768, depth 12, mlp 3072, 12 heads of 64, patch 16",
        "parameters",
        "GFLOP",
        "head.weight",
    ]);
    let graph = place.run("inspect model --graph").succeeds().out;
    assert!(graph.lines().count() > 40, "{graph}");
    place.run("inspect model --set model.heads=7").refuses(&["model.heads = 7"]);
    place.run("inspect model --classes 0").refuses(&["--classes"]);
}

#[test]
fn devices_and_kernels() {
    let place = Place::new();
    place.run("inspect device").succeeds().says(&["GPU ", "kernels  ", "models run on     "]);
    let list = place.run("kernels").succeeds().says(&["kernels/", " threads"]).out;
    assert!(list.lines().count() > 3, "{list}");

    let done = place.run("kernels --export made/here");
    if done.code == Some(0) {
        done.says(&["made/here", "sm_"]);
        let mut command = place.command("inspect device");
        command.env("TRENCADIS_KERNELS", "made/here");
        Done::of(command).succeeds().says(&["fatbins (", "of made/here, by nvcc "]);
        place.write("blocked", "");
        place.run("kernels --export blocked").refuses(&["blocked: is a file", "choose a folder"]);
    } else {
        done.refuses(&["this build has no kernels", "tools/install-cuda", "TRENCADIS_KERNELS"]);
        assert!(!exists(place.path("made")), "nothing is made");
    }
    place.write("broken/manifest.txt", "{}\n");
    let mut command = place.command("inspect device");
    command.env("TRENCADIS_KERNELS", "broken");
    Done::of(command).succeeds().says(&["kernels           none: broken/manifest.txt: is no manifest"]);
}

#[test]
fn every_recipe_is_listed_printed_and_planned() {
    let place = Place::new();
    let list = place.run("recipes").succeeds().out;
    let names: Vec<_> = list
        .lines()
        .take_while(|l| !l.is_empty())
        .map(|l| l.split("  ").next().unwrap().to_owned())
        .collect();
    assert!(names.len() > 15 && names.contains(&"digits".into()), "{names:?}");
    place.photos("photos", 4);
    for name in names {
        place.run(&format!("recipes {name}")).succeeds().says(&["[model]", "[train]"]);
        let data = if name == "digits" { "" } else { "--data photos" };
        place.run(&format!("train {name} {data} --dry-run")).succeeds().says(&["peak memory"]);
    }
}

#[test]
fn every_command_helps() {
    let place = Place::new();
    for command in [
        "",
        "train",
        "eval",
        "predict",
        "inspect",
        "inspect data",
        "inspect model",
        "inspect device",
        "recipes",
        "kernels",
        "forward",
    ] {
        let done = place.run(&format!("{command} --help")).succeeds();
        assert!(done.out.contains("Usage: trencadis") && done.err.is_empty(), "{command}: {}", done.out);
    }
    assert!(place.run("--version").succeeds().out.starts_with("trencadis "));
    let bare = place.run("");
    assert!(bare.code == Some(2) && bare.err.contains("Commands:"), "{}", bare.err);
}
