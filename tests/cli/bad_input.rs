//! Every mistake gets one sentence, exit code 2, and leaves nothing behind.

use image::{GrayImage, ImageBuffer, Luma, Rgb, RgbaImage};

use super::*;

#[test]
fn data_that_cannot_be_used() {
    let place = Place::new();
    fs::create_dir(place.path("empty")).unwrap();
    place.photos("hollow", 3);
    fs::create_dir(place.path("hollow/c")).unwrap();
    for i in 0..6 {
        place.write(&format!("broken/a/{i}.png"), "no image");
        place.write(&format!("broken/b/{i}.jpg"), "no image");
    }
    place.write("loose/1.png", "x");
    place.write("file.txt", "x");
    for (data, parts) in [
        ("absent", ["absent", "no such folder"]),
        ("empty", ["empty", "the folder is empty"]),
        ("hollow", ["hollow/c", "no JPEG, PNG or WebP image"]),
        ("broken", ["none of the ", "is not a JPEG, PNG or WebP image"]),
        ("loose", ["loose", "no class folder"]),
        ("file.txt", ["file.txt", "neither a folder nor a .tar file"]),
    ] {
        place.train(&format!("--data {data}"), &[]).refuses(&parts);
        assert!(!exists(place.path("runs")), "{data}: nothing is left behind");
        place.run(&format!("inspect data {data}")).refuses(&parts);
    }
    // A shard that ends in the middle of a member.
    let mut builder = tar::Builder::new(Vec::new());
    for i in 0..4 {
        let png = encode(&picture(9, 9, i).into(), ImageFormat::Png);
        for (name, data) in [(format!("{i}.png"), png), (format!("{i}.cls"), vec![b'0' + i % 2])] {
            let mut header = tar::Header::new_gnu();
            header.set_size(data.len() as u64);
            builder.append_data(&mut header, name, data.as_slice()).unwrap();
        }
    }
    let shard = builder.into_inner().unwrap();
    place.write("cut-000.tar", &shard[..shard.len() / 2 + 100]);
    place.train("--data cut-000.tar", &[]).refuses(&[
        "cut-000.tar",
        "cut at byte",
        "copy or fetch the shard again",
    ]);
    assert!(!exists(place.path("runs")));
}

#[test]
fn settings_that_cannot_be_met() {
    let place = Place::new();
    for (set, parts) in [
        ("train.stesp=3", ["train.stesp", "did you mean `train.steps`"]),
        ("trian.steps=3", ["trian", "did you mean `train`"]),
        ("train.steps=many", ["train.steps", "must be an integer"]),
        ("train.steps=0", ["train.steps", "at least 1"]),
        ("train.steps", ["train.steps", "expected section.key=value"]),
        ("model.heads=3", ["model.heads = 3", "does not divide model.width = 16"]),
        ("packing.tokens=200", ["packing.tokens", "multiple of 128"]),
        ("model.pool=max", ["model.pool", "map, mean, cls"]),
        ("train.lr=nan", ["train.lr", "above 0"]),
        ("model.width=999999999999", ["model.width", "must lie in 0..1000000"]),
        ("resolution.max=4000", ["resolution.max = 4000", "raise packing.tokens"]),
    ] {
        place.train("", &[set]).refuses(&parts);
    }
    place.run("train navit-s61").refuses(&["`navit-s61`", "did you mean `navit-s16`"]);
    place.run("train my.toml").refuses(&["my.toml", "no such recipe file"]);
    place.write("my.toml", "[model]\nwidht = 3\n");
    place.run("train my.toml").refuses(&["my.toml", "model.widht", "did you mean `model.width`"]);
    place.write("my.toml", "[model\n");
    place.run("train my.toml").refuses(&["my.toml", "line 1"]);
    place.run("train --device cuda").refuses(&["--device cuda", "use --device cpu"]);
    place.run("train --threads 0").refuses(&["--threads must be at least 1"]);
    place.run("recipes nothing").refuses(&["there is no recipe `nothing`"]);
    assert_eq!(fs::read_dir(place.0.path()).unwrap().count(), 1, "the recipe and nothing else");
}

#[test]
fn command_lines_that_make_no_sense() {
    let place = Place::new();
    place.run("trian").refuses(&["'trian'", "'train'"]);
    place.run("eval").refuses(&["<MODEL>"]);
    place.run("eval x --resoltion 3").refuses(&["'--resoltion'", "'--resolution'"]);
    place.run("train --threads many").refuses(&["many", "--threads"]);
    for other in ["digits", "--data x", "--set a.b=1", "--init x", "--name x", "--out x"] {
        place
            .run(&format!("train --resume runs/digits-1 {other}"))
            .refuses(&["cannot be used with", "--resume"]);
    }
}

#[test]
fn files_that_are_no_checkpoint() {
    let place = Place::new();
    place.trained();
    let good = fs::read(place.path("runs/digits-1/last.safetensors")).unwrap();
    place.write("cut.safetensors", &good[..good.len() - 100]);
    place.write("short.safetensors", &good[..100]);
    let mut damaged = good.clone();
    damaged[20..40].fill(b'?');
    place.write("damaged.safetensors", damaged);
    place.write("text.safetensors", "a file of another kind");
    Weights::default().save_atomic(&place.path("foreign.safetensors")).unwrap();
    fs::create_dir(place.path("folder")).unwrap();
    for (file, part) in [
        ("cut.safetensors", "its header describes"),
        ("short.safetensors", "cut short"),
        ("damaged.safetensors", "its header is damaged"),
        ("text.safetensors", "not a readable safetensors file"),
        ("absent.safetensors", "there is no such"),
        ("folder", "folder"),
    ] {
        place.run(&format!("eval {file}")).refuses(&[file, part]);
        place.run(&format!("predict {file} x.png")).refuses(&[file, part]);
        place.train(&format!("--init {file}"), &[]).refuses(&[file]);
    }
    place.run("eval foreign.safetensors").refuses(&["foreign.safetensors", "no known implementation"]);
    assert_eq!(place.runs(), ["digits-1"], "no failed start left a folder");

    place.run("train --resume absent").refuses(&["absent", "no such folder"]);
    place.run("train --resume folder").refuses(&["folder", "nothing to resume"]);
    place.run("train --resume cut.safetensors").refuses(&["cut.safetensors", "is a file"]);
    fs::copy(place.path("cut.safetensors"), place.path("runs/digits-1/last.safetensors")).unwrap();
    place
        .run("train --resume runs/digits-1")
        .refuses(&["runs/digits-1/last.safetensors", "its header describes"]);
    fs::copy(place.path("runs/digits-1/best.safetensors"), place.path("runs/digits-1/last.safetensors"))
        .unwrap();
}

#[test]
fn places_that_cannot_be_written() {
    let place = Place::new();
    place.write("file", "");
    place.train("--out file", &[]).refuses(&["file", "expected a folder"]);
    place.train("--out file/deeper", &[]).refuses(&["file/deeper", "no run folder can be made"]);
    place.train("--name a/b", &[]).refuses(&["a/b", "cannot name a folder"]);
    // A disk that is full: nothing more can be said than that.
    #[cfg(target_os = "linux")]
    {
        let mut command = place.command("recipes");
        command.stdout(fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
        let done = Done::of(command);
        assert_eq!(done.code, Some(1));
        assert!(
            done.err.starts_with("error: cannot write to standard output") && done.err.lines().count() == 1
        );
    }
}

/// Whoever reads the output may leave.
#[cfg(unix)]
#[test]
fn a_closed_pipe_is_no_defect() {
    use std::process::Stdio;
    let place = Place::new();
    let mut command = place.training("", &[]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let child = command.stdout(Stdio::from(writer.try_clone().unwrap())).stderr(Stdio::from(writer)).spawn();
    let code = child.unwrap().wait().unwrap().code();
    assert_eq!(code, Some(0));
}

/// An EXIF segment that turns the picture a quarter.
fn turned(jpeg: &[u8]) -> Vec<u8> {
    let exif = b"Exif\0\0II\x2A\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0";
    let length = (exif.len() as u16 + 2).to_be_bytes();
    [&[0xFF, 0xD8, 0xFF, 0xE1][..], &length, exif, &jpeg[2..]].concat()
}

#[test]
fn unusual_images_train_and_broken_ones_are_named() {
    let place = Place::new();
    place.photos("photos", 4);
    let png = |image: DynamicImage| encode(&image, ImageFormat::Png);
    let deep: ImageBuffer<Rgb<u16>, Vec<u16>> =
        ImageBuffer::from_fn(30, 20, |x, y| Rgb([2000 * x as u16, 99, y as u16]));
    let jpeg = encode(&picture(40, 20, 9).into(), ImageFormat::Jpeg);
    for (name, bytes) in [
        ("dot.png", png(GrayImage::new(1, 1).into())),
        ("long.png", png(GrayImage::new(30_000, 20).into())),
        ("grey.png", png(GrayImage::from_fn(20, 30, |x, y| Luma([(x * y) as u8])).into())),
        ("clear.png", png(RgbaImage::from_pixel(20, 30, image::Rgba([1, 2, 3, 4])).into())),
        ("deep.png", png(deep.into())),
        ("cmyk.jpg", include_bytes!("../sources/cmyk.jpg").to_vec()),
        ("turned.jpg", turned(&jpeg)),
        ("web.webp", encode(&picture(17, 31, 9).into(), ImageFormat::WebP)),
    ] {
        place.write(&format!("photos/a/{name}"), bytes);
    }
    let sets = [
        "resolution.min=16",
        "resolution.max=64",
        "train.steps=6",
        "data.max_unreadable=0",
        "data.validation=0.3",
    ];
    place.train("--data photos", &sets).succeeds();
    place.run("inspect data photos").succeeds().says(&["13 to train on, 3 to validate"]);

    // Two broken files among the training images.
    let whole = encode(&picture(40, 40, 9).into(), ImageFormat::Jpeg);
    place.write("split/val/a/1.jpg", &whole);
    place.write("split/val/b/1.jpg", &whole);
    for i in 0..10 {
        place.write(&format!("split/train/a/{i}.jpg"), &whole);
        place.write(&format!("split/train/b/{i}.jpg"), &whole);
    }
    place.write("split/train/a/cut.jpg", &whole[..whole.len() / 2]);
    place.write("split/train/b/text.jpg", "no image");
    let sets = |share: &'static str| ["resolution.max=64", "resolution.min=64", "train.steps=6", share];
    place
        .train("--data split --name some", &sets("data.max_unreadable=0.5"))
        .succeeds()
        .says_err(&["unreadable images so far, the newest: ", "split/train/"]);
    let done = place.train("--data split --name none", &sets("data.max_unreadable=0.01"));
    assert_eq!(done.code, Some(2), "{}", done.err);
    let sentence = done.err.lines().last().unwrap();
    for part in ["cannot be read, more than data.max_unreadable = 0.01 allows", "split/train/"] {
        assert!(sentence.contains(part), "{sentence}");
    }
    // Either no step had been done and nothing is left, or what had been done is saved and said so.
    let saved = sentence.contains("continue with: trencadis train --resume runs/none-1");
    assert_eq!(exists(place.path("runs/none-1")), saved, "{sentence}");
    assert_eq!(exists(place.path("runs/none-1/last.safetensors")), saved, "{sentence}");
}
