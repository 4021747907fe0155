//! Texts of sources, and what is said of those that cannot be used.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use image::{DynamicImage, GrayImage, ImageFormat};
use tempfile::tempdir;
use trencadis::data::inspect;
use trencadis::data::loader::{Loader, Share};
use trencadis::data::source::{Dataset, of_recipe, open};
use trencadis::data::tokenizer::{BUILT_IN, Tokenizer};
use trencadis::recipe::{DataConfig, Recipe};

use super::recipe;

pub fn png() -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    DynamicImage::from(GrayImage::from_fn(16, 12, |x, y| image::Luma([(9 * x + 5 * y) as u8])))
        .write_to(&mut bytes, ImageFormat::Png)
        .unwrap();
    bytes.into_inner()
}

pub fn write(path: impl AsRef<Path>, bytes: impl AsRef<[u8]>) {
    fs::create_dir_all(path.as_ref().parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

fn tar_of(path: &Path, members: &[(&str, &[u8])]) {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, data) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, *data).unwrap();
    }
    write(path, builder.into_inner().unwrap());
}

fn on(path: &Path, sets: &[&str]) -> Recipe {
    let (source, path) = ("data.source=auto", format!("data.path='{}'", path.display()));
    recipe(&[&[source, &path, "data.validation=0", "data.max_unreadable=1"], sets].concat())
}

fn texts(data: &Dataset) -> Vec<String> {
    (0..data.train.len())
        .map(|i| data.train.caption(i).map_err(|e| e.to_string()).unwrap_or_else(|e| e))
        .collect()
}

#[test]
fn folders_have_a_text_beside_each_image() {
    let dir = tempdir().unwrap();
    for (name, text) in [("cat/1", "a cat"), ("cat/2", "another cat\n"), ("dog/1", "a dog")] {
        write(dir.path().join(format!("{name}.png")), png());
        write(dir.path().join(format!("{name}.txt")), text);
    }
    let data = of_recipe(&on(dir.path(), &[])).unwrap();
    assert_eq!(texts(&data), ["a cat", "another cat\n", "a dog"]);
    assert_eq!(data.classes, ["cat", "dog"]);
    // Without classes all images are of one.
    let flat = tempdir().unwrap();
    write(flat.path().join("1.png"), png());
    write(flat.path().join("1.txt"), "one");
    let data = of_recipe(&on(flat.path(), &[])).unwrap();
    assert_eq!((texts(&data), data.classes), (vec!["one".to_string()], vec!["image".to_string()]));
    let classes =
        open(&DataConfig { path: flat.path().display().to_string(), ..DataConfig::default() }, 1, 0);
    assert!(classes.err().unwrap().to_string().contains("holds images but no class folder"));
}

#[test]
fn shards_have_a_text_member_of_the_same_key() {
    let dir = tempdir().unwrap();
    let (path, image) = (dir.path().join("set.tar"), png());
    tar_of(
        &path,
        &[
            ("a/1.png", &image),
            ("a/1.txt", "ein Café".as_bytes()),
            ("a/2.txt", b"two"),
            ("a/2.png", &image),
            ("a/2.seg.png", &image),
        ],
    );
    let data = of_recipe(&on(&path, &[])).unwrap();
    assert_eq!(texts(&data), ["ein Café", "two"], "a segmentation is no image of the text");
    assert_eq!(data.classes, ["a"], "the folder, and no text");
    // A class number besides.
    let path = dir.path().join("classes.tar");
    tar_of(
        &path,
        &[
            ("1.png", &image),
            ("1.txt", b"one"),
            ("1.cls", b"1"),
            ("2.png", &image),
            ("2.txt", b"two"),
            ("2.cls", b"0"),
        ],
    );
    let data = of_recipe(&on(&path, &[])).unwrap();
    assert_eq!((texts(&data), data.classes.len()), (vec!["one".to_string(), "two".to_string()], 2));
    assert_eq!([0, 1].map(|i| data.train.label(i)), [1, 0]);
    // Without texts to learn from, .txt members are classes.
    let config = DataConfig {
        path: dir.path().join("set.tar").display().to_string(),
        validation: 0.0,
        ..DataConfig::default()
    };
    assert_eq!(open(&config, 1, 0).unwrap().classes, ["ein Café", "two"]);
}

/// A text is that of the image of the same name, dots and all, and of no other.
#[test]
fn names_with_dots_have_their_own_texts() {
    let (dir, image) = (tempdir().unwrap(), png());
    let path = dir.path().join("dots.tar");
    let (first, second, other) =
        (("p.v1.txt", &b"first"[..]), ("p.v2.txt", &b"second"[..]), ("p.txt", &b"p"[..]));
    tar_of(&path, &[("p.v1.png", &image), first, ("p.v2.png", &image), second, other]);
    assert_eq!(texts(&of_recipe(&on(&path, &[])).unwrap()), ["first", "second"]);
    tar_of(&path, &[("p.v1.png", &image), first, ("p.png", &image), other, ("p.depth.png", &image)]);
    assert_eq!(texts(&of_recipe(&on(&path, &[])).unwrap()), ["first", "p"]);
    tar_of(&path, &[("p.v1.png", &image), other]);
    assert!(texts(&of_recipe(&on(&path, &[])).unwrap())[0].contains("p.v1.png: there is no text"));
    let refused = |members: &[(&str, &[u8])]| {
        tar_of(&path, members);
        of_recipe(&on(&path, &[])).err().unwrap().to_string()
    };
    let told = refused(&[("p.png", &image), other, ("p.jpg", &image)]);
    assert!(
        told.contains("member p.jpg: the key has a second image, p.png; give every image a key"),
        "{told}"
    );
    let told = refused(&[("p.png", &image), ("p.cls", b"0"), other, ("q.png", &image), ("q.txt", b"q")]);
    assert!(told.contains("member q.png: there is no label; add a .cls or .json (with `label`)"), "{told}");
}

/// `train/` and `val/` that hold images themselves are the parts, in folders and in shards.
#[test]
fn parts_need_no_classes() {
    let (dir, image) = (tempdir().unwrap(), png());
    let names = ["train/1", "train/2", "val/3"];
    for name in names {
        write(dir.path().join(format!("{name}.png")), &image);
        write(dir.path().join(format!("{name}.txt")), name);
    }
    let shards = tempdir().unwrap();
    let shard = shards.path().join("set.tar");
    let files: Vec<String> = names.iter().flat_map(|n| [format!("{n}.png"), format!("{n}.txt")]).collect();
    let members: Vec<(&str, &[u8])> = files
        .iter()
        .map(|file| {
            (
                file.as_str(),
                if file.ends_with("png") { &image[..] } else { &file.as_bytes()[..file.len() - 4] },
            )
        })
        .collect();
    tar_of(&shard, &members);
    for path in [dir.path(), &shard] {
        let data = of_recipe(&on(path, &[])).unwrap();
        assert_eq!(texts(&data), names[..2], "{}", path.display());
        assert_eq!((data.validation.len(), data.validation.caption(0).unwrap()), (1, "val/3".into()));
        assert_eq!(data.classes, ["image"]);
        assert!(data.description.contains("validation: the val part"), "{}", data.description);
    }
    // Among other classes `train` is one.
    write(dir.path().join("plane/4.png"), &image);
    fs::remove_dir_all(dir.path().join("val")).unwrap();
    assert_eq!(of_recipe(&on(dir.path(), &[])).unwrap().classes, ["plane", "train"]);
}

/// Each is passed over with one sentence that names it, and the others are trained on.
#[test]
fn texts_that_cannot_be_used_are_named() {
    let dir = tempdir().unwrap();
    let bad: [(&str, Option<&[u8]>, &str); 5] = [
        ("missing", None, "there is no text; put it into"),
        ("empty", Some(b""), "the text is empty"),
        ("blank", Some(b" \n"), "the text is empty"),
        ("bytes", Some(b"caf\xe9"), "the text is not valid UTF-8"),
        ("good", Some(b"a handwritten seven"), ""),
    ];
    for (name, text, _) in bad {
        write(dir.path().join(format!("{name}.png")), png());
        if let Some(text) = text {
            write(dir.path().join(format!("{name}.txt")), text);
        }
    }
    let long = "seven ".repeat(40);
    write(dir.path().join("long.png"), png());
    write(dir.path().join("long.txt"), &long);
    let recipe = on(dir.path(), &["text.max_tokens=12", "resolution.min=12", "resolution.max=12"]);
    let data = of_recipe(&recipe).unwrap();
    let mut loader =
        Loader::eval_texts(data.train.clone(), &recipe, Arc::new(Tokenizer::open(BUILT_IN).unwrap()))
            .unwrap();
    let loaded = loader.next().unwrap().unwrap();
    let batch = &loaded.batch;
    assert_eq!(loaded.unreadable.len(), 4, "{:?}", loaded.unreadable);
    for (name, _, sentence) in &bad[..4] {
        let told =
            loaded.unreadable.iter().map(|(_, told)| told).find(|told| told.contains(&format!("{name}.")));
        assert!(told.is_some_and(|told| told.contains(sentence)), "{name}: {:?}", loaded.unreadable);
    }
    let names: Vec<String> = batch.sample_ids[..6].iter().map(|id| data.train.name(*id as usize)).collect();
    for (slot, name) in names.iter().enumerate() {
        let good = name.ends_with("good.png") || name.ends_with("long.png");
        assert_eq!(batch.weights[slot], if good { 1.0 } else { 0.0 }, "{name}");
        let texts = batch.texts.as_ref().unwrap();
        let tokens = texts.range(slot).len();
        let want = if name.ends_with("long.png") {
            12
        } else if good {
            3
        } else {
            1
        };
        assert_eq!(tokens, want, "{name}");
        let places: Vec<u16> = texts.positions[texts.range(slot)].iter().map(|p| p[1]).collect();
        assert_eq!(places, (0..want as u16).collect::<Vec<_>>());
    }
    let report = inspect::report(&data, &recipe, "captions").unwrap();
    let figures = report.texts.as_ref().unwrap();
    assert_eq!([figures.usable, figures.missing, figures.empty, figures.cut], [2, 2, 2, 1]);
    assert_eq!((figures.tokens.min, figures.tokens.max, figures.examples.len()), (3, 40, 4));
    let said = report.to_string();
    assert!(said.contains("2 usable, 2 missing or unreadable, 2 empty, 1 cut off at 12 tokens\n"), "{said}");
    assert!(said.contains("text tokens min 3, mean 21.5, max 40 per text"), "{said}");
    assert_eq!(loaded.cut.len(), 1);
    assert!(loaded.cut[0].ends_with("long.png"));
    let dir = tempdir().unwrap();
    tar_of(&dir.path().join("s.tar"), &[("a/1.png", &png()), ("a/2.png", &png()), ("a/2.txt", b"\xff")]);
    let told = texts(&of_recipe(&on(&dir.path().join("s.tar"), &[])).unwrap());
    assert!(
        told[0].contains("member a/1.png: there is no text; add a .txt member of the same key"),
        "{}",
        told[0]
    );
    assert!(told[1].contains("member a/2.png: the text is not valid UTF-8"), "{}", told[1]);
}

/// The images are those of a run on classes, whatever their texts.
#[test]
fn the_digits_have_texts() {
    let recipe = recipe(&[]);
    let data = of_recipe(&recipe).unwrap();
    let plain = open(&recipe.data, 1, recipe.train.seed).unwrap();
    assert_eq!(data.train.len(), plain.train.len());
    let words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"];
    let tokenizer = Tokenizer::open(BUILT_IN).unwrap();
    for i in (0..data.train.len()).step_by(31) {
        let (text, label) = (data.train.caption(i).unwrap(), data.train.label(i));
        assert!(text.contains(words[label]) || text.contains(&label.to_string()), "{text}: {label}");
        let tokens = tokenizer.encode(&text, 24).unwrap();
        assert_eq!(tokens.ids.len(), text.split(' ').count(), "every word is a token: {text}");
        assert!(!tokens.cut && !tokens.ids.contains(&0), "{text}");
    }
    let mut loader = Loader::train_share(data.train, &recipe, None, Share::ALL).unwrap();
    let batch = loader.next_batch().unwrap().batch;
    let texts = batch.texts.as_ref().unwrap();
    assert_eq!((texts.images, texts.slots(), texts.tokens()), (batch.images, 16, 256));
    // Sources without texts say so.
    let cifar = tempdir().unwrap();
    let row: Vec<u8> = [3].into_iter().chain((0..3072).map(|i| i as u8)).collect();
    for part in 1..=5 {
        write(cifar.path().join(format!("data_batch_{part}.bin")), row.repeat(4));
    }
    write(cifar.path().join("test_batch.bin"), row.repeat(2));
    let config = DataConfig { path: cifar.path().display().to_string(), ..DataConfig::default() };
    let told = open(&config, 3, 0).unwrap().train.caption(0).unwrap_err().to_string();
    assert!(told.contains("data of this kind have no texts"), "{told}");
}

#[test]
fn tokenizers_are_checked() {
    let built_in = Tokenizer::open(BUILT_IN).unwrap();
    let again = Tokenizer::from_json(built_in.json().to_owned()).unwrap();
    let ids = |tokenizer: &Tokenizer| tokenizer.encode("The digit SEVENTY-7!", 24).unwrap().ids;
    assert_eq!(ids(&built_in), ids(&again));
    let cut = built_in.encode("the digit seven", 2).unwrap();
    assert_eq!((cut.ids.len(), cut.cut), (2, true));
    for (text, why) in [("", "the text is empty"), ("\t\n", "the text is empty")] {
        assert_eq!(built_in.encode(text, 5).unwrap_err(), why);
    }
    let dir = tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    let told = |path: &Path| Tokenizer::open(&path.display().to_string()).unwrap_err().to_string();
    assert!(told(&path).contains("tokenizer.json: the tokenizer cannot be read"), "{}", told(&path));
    write(&path, "{}");
    assert!(told(&path).contains("this is no tokenizer.json that can be read"), "{}", told(&path));
    // What a post-processor adds may be beyond the vocabulary, and is no token of the text.
    let adding = |id: usize| {
        let template = r#"{"version":"1.0","added_tokens":[],"normalizer":{"type":"Replace","pattern":{"String":"x"},"content":""},
            "pre_tokenizer":{"type":"Whitespace"},"post_processor":{"type":"TemplateProcessing","single":[
            {"SpecialToken":{"id":"[S]","type_id":0}},{"Sequence":{"id":"A","type_id":0}}],"pair":[
            {"Sequence":{"id":"A","type_id":0}},{"Sequence":{"id":"B","type_id":1}}],"special_tokens":
            {"[S]":{"id":"[S]","ids":[ID],"tokens":["[S]"]}}},
            "model":{"type":"WordLevel","vocab":{"w":0,"a":1,"[S]":2},"unk_token":"w"}}"#;
        template.replace("ID", &id.to_string())
    };
    for beyond in [3, 70_000] {
        write(&path, adding(beyond));
        let told = told(&path);
        assert!(
            told.contains(&format!("a token of number {beyond}, and its vocabulary ends at 2")),
            "{told}"
        );
    }
    let adds = Tokenizer::from_json(adding(2)).unwrap();
    assert_eq!(adds.encode("a", 5).unwrap().ids, [2, 1]);
    assert_eq!(adds.encode("x", 5).unwrap_err(), "the tokenizer makes no token of the text `x`");
    let vocabulary: Vec<String> = (0..65_536).map(|i| format!("\"w{i}\":{i}")).collect();
    let words = format!(
        r#"{{"version":"1.0","added_tokens":[],"model":{{"type":"WordLevel","vocab":{{{}}},"unk_token":"w0"}}}}"#,
        vocabulary.join(",")
    );
    write(&path, words);
    assert!(
        told(&path).contains("knows 65536 tokens, and the text tower takes up to 65535"),
        "{}",
        told(&path)
    );
}
