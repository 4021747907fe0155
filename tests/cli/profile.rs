//! `trencadis profile`.

use super::*;

/// A step that is over in a moment.
const SETS: &str = "--set packing.tokens=256 --set model.depth=2 --steps 2";

fn number(value: &serde_json::Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is a number"))
}

#[test]
fn parts_add_up_to_the_step() {
    let place = Place::new();
    for sets in [SETS.to_owned(), format!("{SETS} --set train.matmul=bf16 --set train.optimizer=sgd")] {
        let words = format!("profile digits {sets} --device cpu --classes 10 --json --trace step.json");
        let profile = &json_lines(&place.run(&words).succeeds().out)[0];
        let (seconds, spans) = (number(&profile["seconds"]), profile["spans"].as_array().unwrap());
        let sum = |key: &str| spans.iter().map(|span| number(&span[key])).sum::<f64>();
        assert!(sum("seconds") <= seconds && sum("seconds") > 0.0, "{profile}");
        // Model FLOPs are three times those of the forward pass; no gradient of the pixels is computed.
        let products = sum("flops") / number(&profile["flops"]);
        assert!((0.97..=1.0 + 1e-9).contains(&products), "{products}: {profile}");
        let rows = profile["rows"].as_array().unwrap();
        let total = |key: &str| rows.iter().map(|row| number(&row[key])).sum::<f64>();
        assert_eq!(total("count") as usize, spans.len());
        for key in ["seconds", "flops", "bytes"] {
            assert!((total(key) / sum(key) - 1.0).abs() < 1e-9, "{key}");
        }
        // One part after the other.
        for pair in spans.windows(2) {
            assert!(
                number(&pair[0]["begin"]) + number(&pair[0]["seconds"]) <= number(&pair[1]["begin"]) + 1e-9
            );
        }
        let names: Vec<&str> = spans.iter().map(|span| span["operation"].as_str().unwrap()).collect();
        assert_eq!((names[0], names[names.len() - 1]), ("zero gradients", "optimiser"));
        // Every part moves bytes: at least what it writes.
        assert!(spans.iter().all(|span| number(&span["bytes"]) > 0.0), "{profile}");
        let peaks = &profile["peaks"];
        assert!(number(&peaks["flops"]) > 0.0 && number(&peaks["bytes"]) > 0.0 && peaks["sheet"] == false);
        assert!(profile["input"].is_null() && total("launches") == 0.0);

        let trace: serde_json::Value =
            serde_json::from_slice(&fs::read(place.path("step.json")).unwrap()).unwrap();
        let events = trace["traceEvents"].as_array().unwrap();
        let complete: Vec<_> = events.iter().filter(|event| event["ph"] == "X").collect();
        assert_eq!(complete.len(), spans.len() + 1);
        assert!(number(&complete[0]["dur"]) <= 1e6 * seconds + 1e-3);
    }
}

#[test]
fn a_profile_is_for_people() {
    let place = Place::new();
    let done = place.run(&format!("profile photos {SETS} --device cpu")).succeeds();
    done.says(&[
        "device            cpu, ",
        "\nrecipe            photos: ",
        "\nstep              ",
        " ms, the fastest of 2; ",
        "\npeaks             ",
        "measured now",
        "\nfloor             ",
        "\noperation  ",
        "\noptimiser ",
        "\nbetween the parts ",
    ]);
    assert_eq!(fs::read_dir(place.0.path()).unwrap().count(), 0);
}

#[test]
fn the_input_is_held_against_the_step() {
    let place = Place::new();
    place.photos("set", 24);
    let words = format!("profile photos {SETS} --device cpu --data set --set data.workers=1");
    place.run(&words).succeeds().says(&[
        "\ninput             ",
        " images by 1 worker alone, ",
        " % of the step\n",
    ]);
    let profile = &json_lines(&place.run(&format!("{words} --json")).succeeds().out)[0];
    let input = &profile["input"];
    assert!(number(&input["seconds"]) > 0.0 && number(&input["images"]) >= 1.0 && input["workers"] == 1);
    place.run(&words.replace("--data set", "--data none")).refuses(&["none"]);
}

#[test]
fn what_cannot_be_profiled_is_told() {
    let place = Place::new();
    place.run("profile nothing").refuses(&["nothing"]);
    place.run("profile captions").refuses(&["text.tokenizer", "a recipe of classes"]);
    place.run("profile digits --steps 0").refuses(&["--steps"]);
    place
        .run(&format!("profile digits {SETS} --device cpu --trace none/step.json"))
        .says_err(&["none/step.json"]);
}
