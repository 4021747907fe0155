//! `trencadis eval` and `trencadis predict`.

use super::*;

#[test]
fn evaluation_in_text_and_json() {
    let place = Place::new();
    place.trained();
    place.run("eval runs/digits-1").succeeds().says(&["best.safetensors", "359", "top-1", "hardest classes"]);
    let lines = json_lines(&place.run("eval runs/digits-1 --resolution 16,24,32 --json").succeeds().out);
    let resolutions: Vec<_> = lines.iter().map(|l| l["resolution"].as_u64().unwrap()).collect();
    assert_eq!(resolutions, [16, 24, 32]);
    let tokens: Vec<_> = lines.iter().map(|l| l["tokens_per_image"].as_f64().unwrap()).collect();
    assert!(tokens[0] < tokens[1] && tokens[1] < tokens[2], "{tokens:?}");
    // The same number that training wrote.
    let written = place.metrics("runs/digits-1");
    let eval = written.iter().find(|line| line["kind"] == "eval").unwrap();
    assert_eq!(lines[2]["top1"], eval["top1"]);
    assert_eq!(lines[2]["loss"], eval["loss"]);

    place.photos("photos", 4);
    place
        .run("eval runs/digits-1 --data photos")
        .refuses(&["2 classes that the model was not trained on: `a`, `b`", "10 classes"]);
    for digit in 0..10 {
        for i in 0..5 {
            let image = picture(8, 12, i * 40);
            place.write(&format!("other/{digit}/{i}.png"), encode(&image.into(), ImageFormat::Png));
        }
    }
    let lines = json_lines(&place.run("eval runs/digits-1 --data other --json").succeeds().out);
    assert_eq!(lines[0]["images"], 50, "other data is evaluated whole");
    place.run("eval runs/digits-1 --resolution 0x3").refuses(&["--resolution"]);
}

#[test]
fn predictions_name_classes() {
    let place = Place::new();
    place.trained();
    // Names of which one begins with another.
    for name in ["a.png", "a.png.png", "b c.png"] {
        place.write(name, encode(&picture(8, 10, 200).into(), ImageFormat::Png));
    }
    let run = |arguments: &[&str]| {
        let mut command = place.command("predict runs/digits-1");
        command.args(arguments);
        Done::of(command)
    };
    let done = run(&["a.png", "b c.png"]).succeeds();
    assert_eq!(done.out.lines().count(), 2 * 6, "{}", done.out);
    let lines = json_lines(&run(&["--json", "--top", "10", "a.png", "a.png.png", "b c.png"]).succeeds().out);
    let names: Vec<_> = lines.iter().map(|l| l["image"].as_str().unwrap()).collect();
    assert_eq!(names, ["a.png", "a.png.png", "b c.png"]);
    for line in &lines {
        let p: Vec<_> =
            line["top"].as_array().unwrap().iter().map(|t| t["probability"].as_f64().unwrap()).collect();
        assert_eq!(p.len(), 10);
        assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-6 && p.is_sorted_by(|a, b| a >= b), "{p:?}");
    }
    assert_eq!(lines[0]["top"], lines[1]["top"], "the same picture");

    // What cannot be read costs its own prediction alone.
    place.write("a.png.png", "no image");
    let done = run(&["--json", "a.png", "a.png.png", "absent.png", "b c.png"]);
    assert_eq!(done.code, Some(2));
    assert_eq!(done.err, "error: 2 of 4 images could not be read\n");
    let lines = json_lines(&done.out);
    let error = |i: usize| lines[i]["error"].as_str().unwrap_or("none");
    assert_eq!([error(0), error(3)], ["none"; 2]);
    assert!(error(1).starts_with("this is not a JPEG"), "{}", error(1));
    assert!(error(2).starts_with("the image cannot be read"), "{}", error(2));
    run(&["--top", "0", "a.png"]).refuses(&["--top"]);
    let done = run(&["absent.png"]);
    assert_eq!((done.code, done.err.as_str()), (Some(2), "error: 1 of 1 images could not be read\n"));
    assert!(done.out.contains("not read: the image cannot be read"), "{}", done.out);
}

/// Width and height of a PNG.
fn size(place: &Place, name: &str) -> (u32, u32) {
    let picture = image::open(place.path(name)).unwrap();
    (picture.width(), picture.height())
}

#[test]
fn attention_is_drawn() {
    let place = Place::new();
    place.train("", &["model.heads=2", "model.head_dim=8"]).succeeds();
    for (name, width, height) in [("wide.png", 40, 10), ("tall.png", 8, 30), ("b/wide.jpg", 12, 12)] {
        let format = if name.ends_with("jpg") { ImageFormat::Jpeg } else { ImageFormat::Png };
        place.write(name, encode(&picture(width, height, 200).into(), format));
    }
    let plain = json_lines(&place.run("predict runs/digits-1 wide.png --json").succeeds().out);
    let words = "predict runs/digits-1 wide.png tall.png b/wide.jpg --attention maps/here --json";
    let lines = json_lines(&place.run(words).succeeds().out);
    let drawn: Vec<_> = lines.iter().map(|line| line["attention"].as_str().unwrap()).collect();
    assert_eq!(drawn, ["wide", "tall", "wide-2"].map(|stem| format!("maps/here/{stem}.attention.png")));
    assert_eq!(lines[0]["top"], plain[0]["top"], "the prediction is the same");
    assert!(plain[0].get("attention").is_none());
    let sizes: Vec<_> = drawn.iter().map(|name| size(&place, name)).collect();
    // The image of 4 x 1 beside its map, each 480 pixels wide, and so on.
    assert_eq!(sizes[0].0, 2 * 480 + 16 + 48);
    assert!(sizes[0].1 < sizes[1].1 && sizes[1].0 < sizes[0].0, "{sizes:?}");
    let done = place.run("predict runs/digits-1 wide.png --attention maps --attention-heads").succeeds();
    done.says(&["  attention maps/wide.attention.png\n"]);
    assert!(size(&place, "maps/wide.attention.png").1 > sizes[0].1, "the heads are below");

    // What cannot be read has no picture, and costs the others nothing.
    let done = place.run("predict runs/digits-1 absent.png tall.png --attention some --json");
    assert_eq!((done.code, done.err.as_str()), (Some(2), "error: 1 of 2 images could not be read\n"));
    assert!(
        exists(place.path("some/tall.attention.png")) && !exists(place.path("some/absent.attention.png"))
    );
    let done = place.run("predict runs/digits-1 absent.png --attention some");
    assert_eq!((done.code, done.err.as_str()), (Some(2), "error: 1 of 1 images could not be read\n"));

    // No image is ever written to.
    let bytes = |name: &str| fs::read(place.path(name)).unwrap();
    let before = bytes("wide.png");
    place.run("predict runs/digits-1 wide.png --attention .").succeeds();
    assert!(exists(place.path("wide.attention.png")) && bytes("wide.png") == before);
    place.write("x.attention.png", &before);
    place.write("x.png", &before);
    place
        .run("predict runs/digits-1 x.png b/../x.attention.png --attention .")
        .refuses(&["x.attention.png: this image is to be drawn, and a picture would overwrite it"]);
    assert!(bytes("x.attention.png") == before && bytes("x.png") == before);
}

#[test]
fn attention_of_a_class_token_and_of_none() {
    let place = Place::new();
    place.write("a.png", encode(&picture(8, 10, 200).into(), ImageFormat::Png));
    place.train("", &["model.pool=\"cls\"", "model.class_token=true"]).succeeds();
    place.run("predict runs/digits-1 a.png --attention maps").succeeds();
    assert!(exists(place.path("maps/a.attention.png")));
    place.train("", &["model.pool=\"mean\""]).succeeds();
    place.run("predict runs/digits-2 a.png --attention none").refuses(&[
        "model.pool = \"mean\"",
        "all patches count alike",
        "no attention to draw",
    ]);
    assert!(!exists(place.path("none")), "nothing is written");
    place.run("predict runs/digits-1 a.png --attention a.png").refuses(&["a.png: this is no folder"]);
    place.run("predict runs/digits-1 a.png --attention-heads").refuses(&["--attention <DIR>"]);
}
