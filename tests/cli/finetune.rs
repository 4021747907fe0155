//! From one checkpoint to other classes, resolutions and shapes, as docs/training.md describes it.

use super::*;

/// `root/<class>/*.png` of the given size, told apart by their colour.
fn set(place: &Place, root: &str, classes: [&str; 3], (width, height): (u32, u32)) {
    for (class, red) in classes.into_iter().zip([20, 120, 220]) {
        for i in 0..8 {
            let image = picture(width + i % 3, height, red);
            place.write(&format!("{root}/{class}/{i}.png"), encode(&image.into(), ImageFormat::Png));
        }
    }
}

/// The line of what a run says at its start.
#[track_caller]
fn line<'a>(done: &'a Done, word: &str) -> &'a str {
    done.err.lines().find(|line| line.starts_with(word)).unwrap_or_else(|| panic!("{word}: {}", done.err))
}

#[test]
fn one_checkpoint_and_several_resolutions() {
    let place = Place::new();
    set(&place, "first", ["ant", "bee", "cat"], (24, 16));
    set(&place, "other", ["dog", "eel", "fox"], (40, 60));
    let sets = |rows: &'static str, columns: &'static str| {
        vec!["model.patch=4", "resolution.min=8", "resolution.max=32", rows, columns]
    };
    let pre = sets("model.position.rows=16", "model.position.columns=16");
    place.train("photos --data first --name pre", &pre).succeeds();
    let mut grid = sets("model.position.rows=8", "model.position.columns=8");
    grid.extend(["resolution.kind=fixed", "resolution.aspect=square"]);
    grid.extend(["model.position.combination=joint", "model.position.coordinate=fractional"]);
    place.train("photos --data first --name grid", &grid).succeeds();

    // Whatever is said of the model stands in the run's own recipe.
    let command = |from: &str, name: &str, more: &[&str]| {
        let words = format!(
            "train runs/{from}/recipe.toml --data other --init runs/{from} --name {name} --threads 2"
        );
        let mut command = place.command(&words);
        for set in more.iter().chain(&["train.steps=6"]) {
            command.args(["--set", set]);
        }
        Done::of(command)
    };
    let tune = |from: &str, name: &str, more: &[&str]| {
        let done = command(from, name, more).succeeds();
        assert_eq!(line(&done, "fresh"), "fresh             head.weight, head.bias");
        assert!(
            line(&done, "start").ends_with(&format!("tensors from runs/{from}/best.safetensors")),
            "{}",
            done.err
        );
        done
    };
    // Another range of resolutions at the images' own shapes.
    let range = ["resolution.min=16", "resolution.max=48", "packing.tokens=512"];
    let square = ["resolution.kind=fixed", "resolution.aspect=square", "resolution.max=40", "eval.crop=1"];
    for done in [tune("pre-1", "range", &range), tune("pre-1", "square", &square)] {
        assert!(!done.err.contains("resized"), "rows and columns stand for places: {}", done.err);
    }
    // A table over one grid follows the grid.
    let larger = ["resolution.max=40", "eval.crop=1", "model.position.rows=10", "model.position.columns=10"];
    let larger = tune("grid-1", "larger", &larger);
    assert_eq!(line(&larger, "resized"), "resized           positions from 8×8 to 10×10 patches (linear)");
    command("pre-1", "moved", &["model.position.rows=20"])
        .refuses(&["runs/pre-1/best.safetensors", "model.position.rows is 16 there and 20 here"]);

    // Each is evaluated at several resolutions, and the square one over crop ratios.
    for name in ["range", "square", "larger"] {
        let done = place.run(&format!("eval runs/{name}-1 --resolution 16,32,40 --json")).succeeds();
        let tokens: Vec<f64> =
            json_lines(&done.out).iter().map(|line| line["tokens_per_image"].as_f64().unwrap()).collect();
        assert!(tokens.len() == 3 && tokens[0] < tokens[1], "{name}: {tokens:?}");
    }
    place
        .run("eval runs/square-1 --suite crop --ratios 0.875,1 --resolution 32,40")
        .succeeds()
        .says(&["crop ratio"]);

    // The head stays where the classes do.
    let words = "train runs/pre-1/recipe.toml --init runs/pre-1 --name same --set train.steps=1";
    let same = place.run(words).succeeds();
    assert!(!same.err.contains("fresh"), "{}", same.err);
    fs::create_dir(place.path("empty")).unwrap();
    let done = place.run("train --init empty").refuses(&[]);
    assert_eq!(
        done.err,
        "error: empty: holds neither best.safetensors nor last.safetensors, expected a model file or the folder of a run\n"
    );
}
