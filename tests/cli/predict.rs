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
