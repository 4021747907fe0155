//! `trencadis eval --suite`, from the binary to the files that it writes.

use serde_json::{Value, json};

use super::*;

/// The report of one suite, and that its three files are there and say the same.
#[track_caller]
pub(super) fn report(place: &Place, suite: &str, words: &str) -> Value {
    let done = place.run(&format!("eval runs/digits-1 --suite {suite} {words} --json")).succeeds();
    let printed = json_lines(&done.out);
    assert_eq!(printed.len(), 1, "{}", done.out);
    let file =
        |end: &str| fs::read_to_string(place.path(&format!("runs/digits-1/eval/{suite}{end}"))).unwrap();
    let written: Value = serde_json::from_str(&file(".json")).unwrap();
    assert_eq!(written, printed[0]);
    assert_eq!(written["suite"], suite);
    let svg = file(".svg");
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n") && !svg.contains("NaN"), "{svg}");
    assert!(file(".txt").starts_with("model             runs/digits-1/best.safetensors\n"));
    written
}

pub(super) fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[track_caller]
pub(super) fn close(a: &Value, b: &Value) {
    assert!((number(a) - number(b)).abs() < 1e-5, "{a} {b}");
}

/// What `eval` without a suite says.
pub(super) fn plain(place: &Place, words: &str) -> Vec<Value> {
    json_lines(&place.run(&format!("eval runs/digits-1 --json {words}")).succeeds().out)
}

/// Grey pictures of any shape, `root/<class>/<name>.png`.
pub(super) fn pictures(place: &Place, root: &str, names: &[(&str, &str)]) {
    for (i, (class, name)) in names.iter().enumerate() {
        let i = i as u32;
        let image = RgbImage::from_fn(8 + i % 5, 8 + i % 3, |x, y| {
            image::Rgb([(x * (17 + 5 * i) + y * y * (3 + i % 7)) as u8; 3])
        });
        place.write(&format!("{root}/{class}/{name}.png"), encode(&image.into(), ImageFormat::Png));
    }
}

/// The most probable class of each picture, as `predict` has it.
fn predicted(place: &Place, paths: &[String]) -> Vec<String> {
    let mut command = place.command("predict runs/digits-1 --json --top 1");
    command.args(paths);
    let class = |line: &Value| line["top"][0]["class"].as_str().unwrap().to_owned();
    json_lines(&Done::of(command).succeeds().out).iter().map(class).collect()
}

#[test]
fn sizes_calibration_and_speed() {
    let place = Place::new();
    place.trained();

    let calibration = report(&place, "calibration", "");
    let whole = &plain(&place, "")[0];
    assert_eq!(calibration["all"]["images"], 359);
    close(&calibration["all"]["loss"], &whole["loss"]);
    close(&calibration["all"]["reliability"]["accuracy"], &whole["top1"]);
    assert_eq!(calibration["all"]["reliability"]["buckets"].as_array().unwrap().len(), 30);
    assert_eq!(
        (&calibration["temperature"]["fitted_on"], &calibration["held_out"]["images"]),
        (&json!(179), &json!(180))
    );
    assert_eq!(calibration["held_out_scaled"]["temperature"], calibration["temperature"]["value"]);
    assert_eq!(
        calibration["held_out"]["reliability"]["accuracy"],
        calibration["held_out_scaled"]["reliability"]["accuracy"],
        "a temperature changes no decision"
    );

    let resolution = report(&place, "resolution", "--resolution 32,16 --tokens 9,36 --drop");
    let resized = resolution["resized"].as_array().unwrap();
    let sizes: Vec<_> = resized.iter().map(|point| point["size"].as_str().unwrap()).collect();
    assert_eq!(sizes, ["9 tokens", "16 px", "36 tokens", "32 px"], "by cost");
    assert!(
        number(&resized[0]["tokens_per_image"]) <= 9.0 && number(&resized[2]["tokens_per_image"]) <= 36.0
    );
    for (point, whole) in [&resized[1], &resized[3]].into_iter().zip(plain(&place, "--resolution 16,32")) {
        for key in ["top1", "top5", "loss", "tokens_per_image", "gflop_per_image"] {
            close(&point[key], &whole[key]);
        }
    }
    let dropped = resolution["dropped"].as_array().unwrap();
    assert_eq!(dropped.len(), 3);
    for (dropped, resized) in dropped.iter().zip(resized) {
        assert_eq!(dropped["size"], "32 px");
        let ratio = number(&dropped["tokens_per_image"]) / number(&resized["tokens_per_image"]);
        assert!((0.95..1.05).contains(&ratio), "as dear as the smaller image: {ratio}");
    }

    let cascade = report(&place, "cascade", "--tokens 36,9");
    let (single, points) = (&cascade["single"], cascade["cascades"][0]["points"].as_array().unwrap());
    assert_eq!(
        (&cascade["cascades"][0]["first"], &cascade["cascades"][0]["second"]),
        (&json!("9 tokens"), &json!("36 tokens"))
    );
    assert_eq!(
        (points.len(), &points[0]["top1"], &points[20]["top1"]),
        (21, &single[0]["top1"], &single[1]["top1"])
    );
    close(&single[0]["top1"], &resized[0]["top1"]);
    close(&single[1]["top1"], &resized[2]["top1"]);
    let flops = |point: &Value| number(&point["gflop_per_image"]);
    let share = 90.0 / 359.0;
    assert!((flops(&points[5]) - flops(&single[0]) - share * flops(&single[1])).abs() < 1e-9);
    assert_eq!(flops(&points[0]), flops(&single[0]));

    let throughput = report(&place, "throughput", "--tokens 9,36 --repetitions 3");
    for size in throughput["sizes"].as_array().unwrap() {
        assert_eq!(size["seconds"].as_array().unwrap().len(), 3);
        let ratio = number(&size["tokens_per_second"]) / number(&size["images_per_second"]);
        assert!((ratio / number(&size["tokens_per_image"]) - 1.0).abs() < 1e-9 && ratio > 1.0, "{size}");
    }

    // Packed otherwise, the same.
    let other = report(&place, "calibration", "--set packing.tokens=1024 --set packing.lookahead=1");
    close(&other["all"]["reliability"]["ece"], &calibration["all"]["reliability"]["ece"]);
    close(&other["temperature"]["value"], &calibration["temperature"]["value"]);

    // For people, and elsewhere.
    let done = place
        .run("eval runs/digits-1/last.safetensors --suite calibration,throughput --out else/where")
        .succeeds();
    let done = done.says(&["runs/digits-1/last.safetensors", "temperature", "ECE %", "images/s"]);
    done.says(&["written           else/where/calibration.json, else/where/calibration.txt, else/where/calibration.svg\n"]);

    place
        .run("eval runs/digits-1 --suite cascade --tokens 9")
        .refuses(&["--suite cascade", "--tokens 64,128"]);
    place
        .run("eval runs/digits-1 --suite cascade --resolution 900,901")
        .refuses(&["cost the same", "900 px"]);
    place.run("eval runs/digits-1 --suite resolution --drop").refuses(&["--drop", "--tokens 64,128"]);
    place
        .run("eval runs/digits-1 --suite calibration --tokens 9,16")
        .refuses(&["--suite calibration", "2 are given"]);
    place
        .run("eval runs/digits-1 --suite resolution --tokens 999")
        .refuses(&["--tokens 999", "packing.tokens = 256"]);
    place.run("eval runs/digits-1 --suite calibraton").refuses(&["calibraton", "calibration"]);
    place.run("eval runs/digits-1 --suite calibration --crop 1.5").refuses(&["--crop 1.5", "at most 1"]);
    place.run("eval runs/digits-1 --suite resolution --resolution 0").refuses(&["--resolution 0"]);
    place.run("eval runs/digits-1 --tokens 9").refuses(&["--suite"]);
    for words in ["", "--suite resolution"] {
        place.run(&format!("eval runs/digits-1 {words} --resolution 16,30001")).refuses(&["30001", "30000"]);
    }
    place
        .run("eval runs/digits-1 --suite resolution --drop --resolution 900,901")
        .refuses(&["--drop", "900 px", "901 px", "differ"]);
    place.run("eval runs/digits-1 --suite cascade,ood --tokens 9,36 --drop").refuses(&[
        "--drop",
        "--suite cascade,ood",
        "--suite resolution",
    ]);
    place
        .run("eval runs/digits-1 --suite calibration --repetitions 3")
        .refuses(&["--repetitions", "--suite throughput"]);
    fs::copy(place.path("runs/digits-1/best.safetensors"), place.path("alone.safetensors")).unwrap();
    place.run("eval alone.safetensors --suite calibration").refuses(&["alone.safetensors", "--out DIR"]);
}

#[test]
fn sets_of_other_classes() {
    let place = Place::new();
    place.trained();
    let names: Vec<(String, String)> =
        (0..24).map(|i| (if i % 3 == 0 { "even" } else { "odd" }.to_owned(), format!("p{i:02}"))).collect();
    let borrowed: Vec<(&str, &str)> = names.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
    pictures(&place, "other", &borrowed);
    let paths: Vec<String> = names.iter().map(|(class, name)| format!("other/{class}/{name}.png")).collect();
    let predicted: Vec<usize> =
        predicted(&place, &paths).iter().map(|class| class.parse().unwrap()).collect();

    place.write("map.json", r#"{"even": [0, 2, 4, 6, 8], "odd": ["1", "3", "5", "7", "9"]}"#);
    let ood = report(&place, "ood", "--data other --label-map map.json");
    let right = |i: usize| predicted[i].is_multiple_of(2) == (names[i].0 == "even");
    let expected = (0..24).filter(|&i| right(i)).count() as f64 / 24.0;
    close(&ood["top1"], &json!(expected));
    assert_eq!(
        (&ood["images"], &ood["left_out"], &ood["compared_classes"]),
        (&json!(24), &json!(0), &json!(10))
    );
    assert_eq!(ood["classes"].as_array().unwrap().len(), 2);

    // Of classes that all mean the same thing every answer is right.
    place.write("map.csv", "even,3,4\n");
    let ood = report(&place, "ood", "--data other --label-map map.csv --restrict");
    assert_eq!((&ood["top1"], &ood["images"], &ood["left_out"]), (&json!(1.0), &json!(8), &json!(16)));
    assert_eq!(ood["compared_classes"], 2);

    // Several right answers an image: the model's own, and none for the last.
    let mut labels: String = predicted
        .iter()
        .take(23)
        .zip(&paths)
        .map(|(class, path)| format!("{path},{class},{}\n", (class + 1) % 10))
        .collect();
    labels += &paths[23];
    place.write("labels.csv", &labels);
    let ood = report(&place, "ood", "--data other --image-labels labels.csv");
    assert_eq!((&ood["top1"], &ood["images"], &ood["left_out"]), (&json!(1.0), &json!(23), &json!(1)));
    let lists: Vec<Vec<usize>> = predicted.iter().map(|class| vec![(class + 1) % 10]).collect();
    place.write("real.json", serde_json::to_string(&lists).unwrap());
    let ood = report(&place, "ood", "--data other --image-labels real.json");
    assert_eq!(
        (&ood["top1"], &ood["images"]),
        (&json!(0.0), &json!(24)),
        "matched by the order of the names"
    );

    // The model's own classes, cropped.
    let digits: Vec<(String, String)> = (0..20).map(|i| ((i % 10).to_string(), format!("d{i}"))).collect();
    pictures(&place, "digits", &digits.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect::<Vec<_>>());
    let ood = report(&place, "ood", "--data digits");
    close(&ood["top1"], &plain(&place, "--data digits")[0]["top1"]);
    assert_eq!(ood["crop"], Value::Null);
    let cropped = report(&place, "ood", "--data digits --crop 0.875");
    assert_eq!(cropped["crop"], json!({"sides": 0.875}));
    let square = report(&place, "ood", "--data digits --crop-square 0.75");
    assert_eq!(square["crop"], json!({"square": 0.75}));
    // Instead of the recipe's own crop, not on top of it.
    let own = "--set resolution.aspect=square --set eval.crop=0.5";
    let whole = report(&place, "ood", "--data digits --crop-square 0.75 --set resolution.aspect=square");
    let both = report(&place, "ood", &format!("--data digits --crop-square 0.75 {own}"));
    assert_eq!((&both["ece"], &both["crop"]), (&whole["ece"], &json!({"square": 0.75})));
    assert_eq!(report(&place, "ood", &format!("--data digits {own}"))["crop"], json!({"eval.crop": 0.5}));

    let refused = |words: &str, parts: &[&str]| {
        place.run(&format!("eval runs/digits-1 --suite ood --data other {words}")).refuses(parts);
    };
    refused("", &["`even` is none of the model's", "--label-map"]);
    refused("--label-map map.json --image-labels labels.csv", &["--label-map", "--image-labels"]);
    place.write("bad.json", r#"{"even": ["12", "zero"], "odd": 1}"#);
    refused("--label-map bad.json", &["bad.json", "2 classes that the model does not have", "`12`"]);
    place.write("bad.csv", "evn,3\nodd,4\n");
    refused("--label-map bad.csv", &["the set does not have", "`evn` (did you mean `even`?)"]);
    refused("--label-map absent.csv", &["absent.csv", "cannot be read"]);
    place.write("few.csv", "p00.png,3\n");
    refused("--image-labels few.csv", &["23 of 24 images have no labels", "p03.png"]);
    place.write("twice.csv", labels.clone() + "\np00.png,3\n");
    refused("--image-labels twice.csv", &["twice.csv", "p00.png` is named twice"]);
    place.write("short.json", "[[1]]");
    refused("--image-labels short.json", &["1 lists", "24 images"]);
    place.write("none.csv", "# nothing\n");
    refused("--label-map none.csv", &["none.csv", "is empty"]);
}

#[test]
fn shape_or_texture() {
    let place = Place::new();
    place.trained();
    let categories = ["cat", "dog", "car"];
    let mut names = Vec::new();
    for shape in categories {
        for texture in categories {
            for i in 0..4 {
                names.push((shape, format!("{shape}{i}-{texture}{}", i + 1)));
            }
        }
    }
    let mut stimuli: Vec<(&str, &str)> = names.iter().map(|(shape, name)| (*shape, name.as_str())).collect();
    // The model has no class for a bear.
    stimuli.push(("bear", "bear1-cat1"));
    pictures(&place, "cue-conflict", &stimuli);
    // A class a category, so that the largest probability of a class decides, as `predict` has it.
    place.write("map.json", r#"{"cat": [0, 1, 2, 3], "dog": [4, 5, 6], "car": [7, 8, 9]}"#);
    let words = "--data cue-conflict --label-map map.json";
    let first = report(&place, "shape-bias", words);
    let observer = &first["observers"][0];
    assert_eq!((&observer["images"], &first["left_out"]), (&json!(36), &json!(1)));
    assert_eq!(observer["cues"]["conflicts"], 24);
    let table = fs::read_to_string(place.path("runs/digits-1/eval/shape-bias-decisions.csv")).unwrap();
    let rows: Vec<Vec<&str>> = table.lines().skip(1).map(|line| line.split(',').collect()).collect();
    assert_eq!(rows.len(), 36);
    let count = |wanted: &dyn Fn(&[&str]) -> bool| rows.iter().filter(|row| wanted(row)).count();
    let shape = count(&|row| row[1] == row[2] && row[2] != row[3]);
    let texture = count(&|row| row[1] == row[3] && row[2] != row[3]);
    assert_eq!((&observer["cues"]["shape"], &observer["cues"]["texture"]), (&json!(shape), &json!(texture)));
    assert!(shape + texture > 0, "something is decided");
    close(&observer["shape_bias"], &json!(shape as f64 / (shape + texture) as f64));
    close(&observer["accuracy"], &json!(count(&|row| row[1] == row[2]) as f64 / 36.0));

    // Against itself, by its decisions and as a model.
    fs::copy(place.path("runs/digits-1/eval/shape-bias-decisions.csv"), place.path("self.csv")).unwrap();
    let renamed: String =
        rows.iter().enumerate().map(|(i, row)| format!("{i:04}_cue_{}\t{}\n", row[0], row[1])).collect();
    place.write("renamed.tsv", format!("imagename\tobject_response\n{renamed}"));
    for against in ["self.csv", "renamed.tsv", "runs/digits-1"] {
        let report = report(&place, "shape-bias", &format!("{words} --against {against}"));
        let agreement = &report["agreements"][0];
        assert_eq!(
            (&agreement["images"], &agreement["agreement"]["error_consistency"]),
            (&json!(36), &json!(1.0))
        );
        assert_eq!(agreement["agreement"]["accuracy_difference"], 0.0);
        assert_eq!(report["observers"][1]["cues"], report["observers"][0]["cues"]);
    }
    // Two people, of whom one always names the shape and one never.
    let mut people = String::from("subj,imagename,object_response,rt\n");
    for row in &rows {
        people += &format!("one,{},{},1\ntwo,{},na,2\n", row[0], row[2], row[0]);
    }
    place.write("people.csv", people);
    let report = report(&place, "shape-bias", &format!("{words} --against people.csv"));
    let accuracy = number(&observer["accuracy"]);
    for (agreement, consistent) in
        report["agreements"].as_array().unwrap().iter().zip([accuracy, 1.0 - accuracy])
    {
        close(&agreement["agreement"]["observed_consistency"], &json!(consistent));
        close(&agreement["agreement"]["error_consistency"], &json!(0.0));
    }
    let text = fs::read_to_string(place.path("runs/digits-1/eval/shape-bias.txt")).unwrap();
    assert!(text.contains("error consistency") && text.contains("\nmean "), "{text}");

    let refused = |words: &str, parts: &[&str]| {
        place.run(&format!("eval runs/digits-1 --suite shape-bias {words}")).refuses(parts);
    };
    refused("--data cue-conflict", &["16 categories", "--label-map"]);
    refused("--label-map map.json", &["built-in digits image", "cat7-elephant1.png"]);
    place.write("bad.json", r#"{"cat": 0, "dgo": 1}"#);
    refused("--data cue-conflict --label-map bad.json", &["bad.json", "`dgo` (did you mean `dog`?)"]);
    place.write("bad.csv", "image,what\ncat0-dog1.png,cat\n");
    refused(
        &format!("{words} --against bad.csv"),
        &["bad.csv", "no column `object_response`", "image, what"],
    );
    place.write("answer.csv", "image,decision\ncat0-dog1.png,dgo\n");
    refused(&format!("{words} --against answer.csv"), &["answer.csv", "line 2", "`dgo`", "`na`"]);
    place.write("twice.csv", "image,decision\ncat0-dog1.png,dog\ncat/cat0-dog1.png,\n");
    refused(&format!("{words} --against twice.csv"), &["twice.csv", "line 3", "named twice"]);
    place.write("stray.csv", "image,decision\ncat0-dgo1.png,cat\n");
    refused(
        &format!("{words} --against stray.csv"),
        &["no image `cat0-dgo1.png`", "did you mean `cat0-dog1.png`"],
    );
}

#[test]
fn groups_of_images() {
    let place = Place::new();
    place.trained();
    let mut names: Vec<(String, String)> =
        (0..40).map(|i| ((i % 10).to_string(), format!("p{i:02}"))).collect();
    names[39].1 = "#39".into();
    pictures(&place, "other", &names.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect::<Vec<_>>());
    let paths: Vec<String> = names.iter().map(|(class, name)| format!("other/{class}/{name}.png")).collect();
    let predicted = predicted(&place, &paths);
    let group = |i: usize| ["north", "south"][usize::from(i % 4 == 1)];
    let mut table = String::from("image,side,\"hour, about\"\n");
    for (i, (_, name)) in names.iter().enumerate() {
        table += &format!("{name}.png,{},{}\n", group(i), i / 20);
    }
    place.write("groups.csv", &table);
    let words = "--data other --attributes groups.csv";
    let fairness = report(&place, "fairness", words);
    let side = &fairness["attributes"][0];
    assert_eq!(
        (&side["attribute"], &side["groups"], &side["images"]),
        (&json!("side"), &json!(["north", "south"]), &json!([30, 10]))
    );
    assert_eq!(fairness["attributes"][1]["attribute"], "hour, about");
    let share = |g: &str, counts: &dyn Fn(usize) -> bool| {
        let own: Vec<usize> = (0..40).filter(|&i| group(i) == g).collect();
        own.iter().filter(|&&i| counts(i)).count() as f64 / own.len() as f64
    };
    let right = |i: usize| predicted[i] == names[i].0;
    for (got, g) in side["accuracy"].as_array().unwrap().iter().zip(["north", "south"]) {
        close(got, &json!(share(g, &right)));
    }
    close(&side["accuracy_gap"], &json!((share("north", &right) - share("south", &right)).abs()));
    let gap = |class: usize| {
        let taken = |i: usize| predicted[i] == class.to_string();
        (share("north", &taken) - share("south", &taken)).abs()
    };
    close(&side["parity_gap"], &json!((0..10).map(gap).fold(0.0, f64::max)));

    let fairness = report(&place, "fairness", &format!("{words} --positive 3"));
    let post = &fairness["attributes"][0]["post_processing"];
    assert_eq!(
        (&post["fitted_on"], &post["shown_on"], &post["class"]),
        (&json!(20), &json!(20), &json!("3"))
    );
    assert_eq!(post["thresholds"]["thresholds"].as_array().unwrap().len(), 2);
    let calibration = report(&place, "calibration", words);
    let groups = calibration["groups"].as_array().unwrap();
    assert_eq!(groups.len(), 4);
    let images: u64 = groups[..2].iter().map(|group| group["images"].as_u64().unwrap()).sum();
    assert_eq!(images, 20, "the held-out half");

    let refused = |table: &str, parts: &[&str]| {
        place.write("bad.csv", table);
        for suite in ["fairness", "calibration"] {
            let words = format!("eval runs/digits-1 --suite {suite} --data other --attributes bad.csv");
            place.run(&words).refuses(&[&["bad.csv"], parts].concat());
        }
    };
    refused("", &["no header"]);
    refused("image,side\n", &["0 lines"]);
    refused("image\np00.png\n", &["image,attribute"]);
    refused(&table.replace("p07.png", "p77.png"), &["no image `p77.png`", "did you mean `p"]);
    refused(&table.replace("p07.png,north,0\n", ""), &["1 of 40 images have no attributes", "p07.png"]);
    refused(&table.replace("p07.png,north", "p07.png,"), &["line 9", "`p07.png` has no side"]);
    refused(&table.replace("p07.png", "p06.png"), &["line 9", "named twice"]);
    refused(&table.replace("p07.png,north", "p07.png"), &["no table"]);
    place.run("eval runs/digits-1 --suite fairness").refuses(&["--attributes CSV"]);
    place
        .run(&format!("eval runs/digits-1 --suite fairness {words} --positive x"))
        .refuses(&["--positive x", "no class"]);
}
