//! `trencadis eval --suite` of what is fitted on frozen features, and of crop ratios.

use serde_json::{Value, json};

use super::suites::{close, number, pictures, plain, report};
use super::*;

/// The one sentence of a refusal, whole.
#[track_caller]
fn refused(place: &Place, words: &str, sentence: &str) {
    let done = place.run(&format!("eval {words}")).refuses(&[]);
    assert_eq!(done.err, format!("error: {sentence}\n"));
}

#[test]
fn a_few_images_of_each_class() {
    let place = Place::new();
    place.trained();
    let words = "--shots 5,1,5 --seeds 3 --l2 1024,1";
    let found = report(&place, "few-shot", words);
    let shots = found["few_shot"].as_array().unwrap();
    assert_eq!(shots.iter().map(|s| &s["shots"]).collect::<Vec<_>>(), [&json!(1), &json!(5)]);
    assert_eq!((&found["images"], &found["features"], &found["seeds"]), (&json!(359), &json!(16), &json!(3)));
    // At most 3 draws of 5 images of 10 classes, and never all of the 1438.
    let used = number(&found["train_images"]);
    assert!(50.0 < used && used <= 150.0, "{used}");
    for by_l2 in shots.iter().flat_map(|s| s["by_l2"].as_array().unwrap()) {
        let each: Vec<f64> = by_l2["each"].as_array().unwrap().iter().map(number).collect();
        let mean = each.iter().sum::<f64>() / 3.0;
        let variance = each.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 2.0;
        close(&by_l2["top1"], &json!(mean));
        close(&by_l2["deviation"], &json!(variance.sqrt()));
    }
    let top1 = |shots: usize| number(&found["few_shot"][shots]["by_l2"][0]["top1"]);
    assert!(top1(1) > 0.1, "better than chance: {}", top1(1));
    assert!(top1(1) > top1(0), "more images tell more: {} {}", top1(0), top1(1));
    assert_eq!(report(&place, "few-shot", words), found, "it repeats");
    // The first draws are the same, whatever else is drawn.
    let one = report(&place, "few-shot", "--shots 1 --seeds 1 --l2 1");
    assert_eq!(one["few_shot"][0]["by_l2"][0]["each"][0], found["few_shot"][0]["by_l2"][1]["each"][0]);
    assert_eq!(one["few_shot"][0]["by_l2"][0]["deviation"], Value::Null);
    let other = report(&place, "few-shot", "--shots 1,5 --l2 1024,1 --set train.seed=1");
    assert_ne!(other["few_shot"], found["few_shot"], "by seed");

    // All the 10 to train on and the 359 others are too large for the budget, and the table says so.
    let large = report(&place, "few-shot", "--shots 1 --seeds 1 --l2 1 --resolution 512");
    assert_eq!(large["downscaled"], 10 + 359);
    let text = fs::read_to_string(place.path("runs/digits-1/eval/few-shot.txt")).unwrap();
    assert!(text.contains("\ndownscaled        369: at this resolution"), "{text}");
    assert_eq!(found["downscaled"], 0);

    let run = "runs/digits-1 --suite few-shot";
    refused(
        &place,
        &format!("{run} --shots 1,500"),
        "--suite few-shot draws 500 training images of each class, and `0` has 142; give no more, such as --shots 142",
    );
    refused(&place, &format!("{run} --l2 1,0"), "--l2 0: expected numbers above 0");
    place.run(&format!("eval {run} --shots 0")).refuses(&["--shots", "0"]);
    place.run(&format!("eval {run} --seeds 0")).refuses(&["--seeds", "0"]);
    place.run(&format!("eval {run} --lr 1")).refuses(&["--lr says nothing to --suite few-shot"]);
    refused(
        &place,
        &format!("{run} --set data.validation=0"),
        "built-in digits, no validation (data.validation = 0): there are no validation images to evaluate on; name others \
         with --data",
    );
}

#[test]
fn a_linear_classifier_of_frozen_features() {
    let place = Place::new();
    place.trained();
    let found = report(&place, "linear-probe", "");
    let tried = found["tried"].as_array().unwrap();
    assert_eq!((tried.len(), &found["epochs"], &found["held_out"]), (6, &json!(10), &json!(143)));
    assert_eq!((&found["train_images"], &found["images"]), (&json!(1438), &json!(359)));
    let best = tried.iter().map(|t| number(&t["top1"])).fold(0.0, f64::max);
    let chosen = tried.iter().find(|t| t["learning_rate"] == found["learning_rate"]).unwrap();
    assert_eq!(number(&chosen["top1"]), best);
    // The classes' accuracies are those of the whole.
    let classes = found["classes"].as_array().unwrap();
    let right: f64 = classes.iter().map(|c| number(&c["top1"]) * number(&c["images"])).sum();
    close(&found["top1"], &json!(right / 359.0));
    assert!(number(&found["top1"]) > number(&plain(&place, "")[0]["top1"]), "than the head of 12 steps");
    assert!(number(&found["top5"]) >= number(&found["top1"]) && number(&found["ece"]) < 0.5);
    let losses: Vec<f64> = found["train_loss"].as_array().unwrap().iter().map(number).collect();
    assert!(losses.len() == 10 && losses[9] < losses[0], "{losses:?}");
    assert_eq!(report(&place, "linear-probe", "--threads 1"), found, "it repeats");
    let one = report(&place, "linear-probe", "--lr 0.1 --epochs 2");
    assert_eq!((one["tried"].as_array().unwrap().len(), &one["epochs"]), (1, &json!(2)));

    let run = "runs/digits-1 --suite linear-probe";
    refused(&place, &format!("{run} --lr=-1"), "--lr -1: expected numbers above 0");
    refused(
        &place,
        &format!("{run} --lr 1e38,1e39"),
        "--suite linear-probe: every learning rate of --lr diverges; give smaller ones than 1e38",
    );
    place.run(&format!("eval {run} --epochs 0")).refuses(&["--epochs", "0"]);
    place.run(&format!("eval {run} --shots 1")).refuses(&["--shots says nothing to --suite linear-probe"]);
    // Both on one page.
    place.run("eval runs/digits-1 --suite few-shot --shots 1,2").succeeds();
    place.run("report runs/digits-1 --samples 0 --out page.html").succeeds();
    let page = fs::read_to_string(place.path("page.html")).unwrap();
    for part in ["Few-shot regression, L2 1024", "Linear probe", "learning rate"] {
        assert!(page.contains(part), "{part}");
    }
}

/// The set's classes count, and not those of the model, which may have none.
#[test]
fn probes_of_other_classes_and_of_foreign_backbones() {
    let place = Place::new();
    place.trained();
    place.photos("photos", 12);
    let probe = report(&place, "linear-probe", "--data photos");
    assert_eq!((&probe["train_images"], &probe["images"]), (&json!(20), &json!(4)));
    assert_eq!(probe["classes"][1]["class"], "b");
    assert_eq!(probe["top1"], 1.0, "bright and dark");

    let file = crate::places::golden("dinov2/weights.safetensors");
    place.write("dinov2.safetensors", fs::read(file).unwrap());
    let foreign =
        "dinov2.safetensors --suite few-shot,linear-probe --data photos --out out --set model.heads=2 --json";
    let done = place.run(&format!("eval {foreign} --shots 1,4 --seeds 2")).succeeds();
    let [few_shot, probe] = &json_lines(&done.out)[..] else { panic!("{}", done.out) };
    assert_eq!(
        (&few_shot["images"], &probe["images"], &probe["classes"][0]["class"]),
        (&json!(4), &json!(4), &json!("a"))
    );
    assert_eq!((&probe["features"], &few_shot["features"]), (&json!(16), &json!(16)));

    refused(
        &place,
        "runs/digits-1 --suite few-shot --data photos",
        "--suite few-shot draws 25 training images of each class, and `a` has 10; give no more, such as --shots 10",
    );
    place.photos("small", 4);
    refused(
        &place,
        "runs/digits-1 --suite linear-probe --data small",
        "--suite linear-probe needs at least 10 images to fit to, of which some are held out, and there are 6; give it more \
         with --data",
    );
    fs::remove_dir_all(place.path("small/b")).unwrap();
    let done = place.run("eval runs/digits-1 --suite few-shot --data small").refuses(&[]);
    assert!(
        done.err.starts_with("error: --suite few-shot fits a linear model to training images")
            && done.err.ends_with(" has one class alone; there is nothing to tell apart\n"),
        "{}",
        done.err
    );
}

#[test]
fn crop_ratios() {
    let place = Place::new();
    place.train("", &["resolution.aspect=\"square\"", "eval.crop=0.875"]).succeeds();
    let found = report(&place, "crop", "--ratios 1,0,0.5,1 --resolution 16,32");
    let crops = found["crops"].as_array().unwrap();
    let of = |crop: &Value| (crop["size"].as_str().unwrap().to_owned(), number(&crop["ratio"]));
    assert_eq!(
        crops.iter().map(of).collect::<Vec<_>>(),
        ["16 px", "32 px"]
            .iter()
            .flat_map(|size| [0.0, 0.5, 1.0].map(|r| ((*size).to_owned(), r)))
            .collect::<Vec<_>>()
    );
    for (column, ratio) in ["0", "0.5", "1"].into_iter().enumerate() {
        let whole = plain(&place, &format!("--resolution 16,32 --set eval.crop={ratio}"));
        for (row, whole) in whole.iter().enumerate() {
            for key in ["top1", "loss", "tokens_per_image"] {
                close(&crops[3 * row + column][key], &whole[key]);
            }
        }
    }
    let best = crops.iter().map(|crop| number(&crop["top1"])).fold(0.0, f64::max);
    assert_eq!(number(&found["best"]["top1"]), best);
    assert_eq!(report(&place, "crop", "")["crops"].as_array().unwrap().len(), 6);

    let large = report(&place, "crop", "--ratios 0 --resolution 32,512");
    assert_eq!(
        (&large["crops"][0]["downscaled"], &large["crops"][1]["downscaled"]),
        (&json!(0), &json!(359))
    );
    let text = fs::read_to_string(place.path("runs/digits-1/eval/crop.txt")).unwrap();
    assert!(text.contains("\ndownscaled        359 at 512 px: they have no place"), "{text}");

    let run = "runs/digits-1 --suite crop";
    refused(
        &place,
        &format!("{run} --ratios 1.5"),
        "--ratios 1.5: a crop ratio is 0, for the whole image, or lies in 0.01..1",
    );
    refused(
        &place,
        &format!("{run} --crop 0.5"),
        "--suite crop tries crop ratios of its own, --ratios, in place of eval.crop; leave --crop and --crop-square out",
    );
    refused(
        &place,
        &format!("{run} --set resolution.aspect=native --set eval.crop=0"),
        "--suite crop cuts squares, and the model sees whole images of any shape (resolution.aspect = \"native\"); to look \
         at a part of these use --crop, or give --set resolution.aspect=square",
    );
}

#[test]
fn attributes_from_features() {
    let place = Place::new();
    place.trained();
    let names: Vec<(String, String)> = (0..60).map(|i| ((i % 10).to_string(), format!("p{i:02}"))).collect();
    pictures(&place, "other", &names.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect::<Vec<_>>());
    let mut table = String::from("image,width,luck\n");
    for i in 0..60 {
        // The pictures' width, and what no picture tells.
        table += &format!("p{i:02}.png,{},{}\n", ["narrow", "wide"][usize::from(i % 5 > 2)], i * i % 7 % 2);
    }
    place.write("groups.csv", &table);
    let words = "--data other --attributes groups.csv --probe";
    let found = report(&place, "fairness", words);
    assert_eq!(found["attributes"][1]["attribute"], "luck", "the decisions by group are there too");
    let probe = &found["probe"];
    assert_eq!((&probe["fitted_on"], &probe["shown_on"]), (&json!(30), &json!(30)));
    let mut differences = Vec::new();
    for told in probe["attributes"].as_array().unwrap() {
        let (native, square) = (number(&told["native_alone"]), number(&told["square_alone"]));
        close(&told["difference"], &json!((native - square) / 30.0));
        close(&told["difference"], &json!(number(&told["native"]) - number(&told["square"])));
        // The tail of a fair coin, from the definition.
        let (coins, least) = ((native + square) as u32, native.min(square) as u32);
        let choose = |k: u32| (0..k).fold(1.0, |c, i| c * f64::from(coins - i) / f64::from(i + 1));
        let tail: f64 = (0..=least).map(|k| choose(k) / 2f64.powi(coins as i32)).sum();
        close(&told["mcnemar_p"], &json!((2.0 * tail).min(1.0)));
        differences.push(native - square);
    }
    // Of two differences: all one way has probability 1/4 on either side.
    let expected = match differences.iter().filter(|d| **d != 0.0).count() {
        0 => Value::Null,
        2 if differences[0] * differences[1] > 0.0 => json!(0.5),
        _ => json!(1.0),
    };
    assert_eq!(probe["wilcoxon_p"], expected);
    assert_eq!(report(&place, "fairness", words), found, "it repeats");
    assert_eq!(probe["downscaled"], json!([0, 0]));
    let text = fs::read_to_string(place.path("runs/digits-1/eval/fairness.txt")).unwrap();
    assert!(text.contains("p, McNemar") && text.contains("\nall attributes    "), "{text}");

    let large = report(&place, "fairness", &format!("{words} --resolution 512"));
    assert_eq!(large["probe"]["downscaled"], json!([60, 60]));
    let text = fs::read_to_string(place.path("runs/digits-1/eval/fairness.txt")).unwrap();
    assert!(text.contains("the aspects do not have equal area"), "{text}");

    // The model need not know the classes, for the decisions alone are about them.
    fs::rename(place.path("other/0"), place.path("other/00")).unwrap();
    let found = report(&place, "fairness", words);
    assert_eq!((&found["attributes"], &found["probe"]), (&Value::Null, probe));
    place.run(&format!("eval runs/digits-1 --suite fairness {words} --positive 3")).refuses(&["`00`"]);

    place.write("same.csv", table.replace("wide", "narrow"));
    refused(
        &place,
        "runs/digits-1 --suite fairness --data other --attributes same.csv --probe",
        "--probe: width is `narrow` of every image, so that there is nothing to tell; take the column out",
    );
    place
        .run("eval runs/digits-1 --suite calibration --probe")
        .refuses(&["--probe says nothing to --suite calibration"]);
}
