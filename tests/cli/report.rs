//! `trencadis report`.

use super::*;

#[test]
fn two_runs_on_one_page() {
    let place = Place::new();
    place.train("", &["train.eval_every=4"]).succeeds();
    place.train("", &["train.lr=0.002"]).succeeds();
    place.run("eval runs/digits-1 --suite cascade,resolution --tokens 9,36").succeeds();
    let done = place.run("report runs/digits-1 runs/digits-2 --samples 5 --out page.html").succeeds();
    assert!(done.out.starts_with("written           page.html ("), "{}", done.out);
    let page = fs::read_to_string(place.path("page.html")).unwrap();
    for part in [
        "digits-2",
        "Training loss",
        "Learning rate",
        "Accuracy against compute",
        "Padding",
        "Gradient norm",
        "Accuracy by tokens",
        "Cascade by confidence",
        "train.eval_every",
        "0.002",
    ] {
        assert!(page.contains(part), "{part}");
    }
    assert!(!page.contains("NaN") && !page.contains("inf"), "no number that is none");
    assert_eq!(page.matches("src=\"data:image/png;base64,").count(), 10);
    assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
    // Runs over one set show the same images.
    let pictures: Vec<&str> =
        page.split("src=\"data:").skip(1).map(|part| part.split('"').next().unwrap()).collect();
    assert_eq!(pictures[..5], pictures[5..]);
}

#[test]
fn a_run_whose_data_are_gone() {
    let place = Place::new();
    place.photos("photos", 6);
    place.train("--data photos", &["model.patch=16", "resolution.min=16", "resolution.max=32"]).succeeds();
    fs::rename(place.path("photos"), place.path("elsewhere")).unwrap();
    place.run("report runs/photos-1").refuses(&["photos", "--samples 0"]);
    assert!(!place.path("report.html").exists());
    place.run("report runs/photos-1 --samples 0").succeeds();
    assert!(place.path("report.html").exists());
}

#[test]
fn what_is_no_run_is_refused() {
    let place = Place::new();
    place.write("empty/notes.txt", "");
    place.run("report empty").refuses(&["empty", "no recipe.toml"]);
    place.run("report absent").refuses(&["absent"]);
    place.run("report").refuses(&["RUN"]);
}
