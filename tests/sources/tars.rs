//! Tar shards in both conventions.

use std::fs;
use std::path::Path;

use tempfile::tempdir;
use trencadis::data::source::open;
use trencadis::recipe::DataConfig;

use super::*;

fn tar_of(members: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, data) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        if path.starts_with("./") {
            // `tar -c .` writes such names; the builder would drop the dot.
            header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
            header.set_cksum();
            builder.append(&header, data.as_slice()).unwrap();
        } else {
            builder.append_data(&mut header, path, data.as_slice()).unwrap();
        }
    }
    builder.into_inner().unwrap()
}

fn shard(path: impl AsRef<Path>, members: &[(&str, Vec<u8>)]) {
    write(path, tar_of(members));
}

/// Everything trains, so that labels and order show.
fn all(path: impl AsRef<Path>) -> DataConfig {
    DataConfig { validation: 0.0, ..config(path) }
}

#[test]
fn integer_labels() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("set.tar");
    shard(
        &path,
        &[
            ("./a/0001.jpg", grey_png(1)),
            ("./a/0001.cls", b"2\n".to_vec()),
            ("./a/0001.txt", b"a caption".to_vec()),
            // Label first, and a mask that is no image of its own.
            ("./a/0002.json", br#"{"label": 0, "width": 3}"#.to_vec()),
            ("./a/0002.seg.png", grey_png(99)),
            ("./a/0002.PNG", grey_png(2)),
            // The same base name in another folder is another key.
            ("./b/0001.webp", grey_png(3)),
            ("./b/0001.cls", b"0".to_vec()),
            ("./._0003.jpg", b"finder debris".to_vec()),
        ],
    );
    let data = open(&all(&path), 1, 0).unwrap();
    assert_eq!(data.classes, ["0", "1", "2"]);
    assert_eq!(samples(&*data.train), [(2, 1), (0, 2), (0, 3)]);
    assert!(data.train.name(1).ends_with("set.tar member ./a/0002.PNG"), "{}", data.train.name(1));
    assert_eq!(data.train.size(1).unwrap(), (2, 3));

    write(dir.path().join("classes.txt"), "cat\ndog\ncow\n");
    assert_eq!(open(&all(&path), 1, 0).unwrap().classes, ["cat", "dog", "cow"]);
}

#[test]
fn names_as_labels() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("set.tar");
    shard(
        &path,
        &[
            ("1.png", grey_png(1)),
            ("1.txt", b"zebra\n".to_vec()),
            ("2.png", grey_png(2)),
            ("2.json", br#"{"class": "ant", "caption": "an ant"}"#.to_vec()),
            ("3.png", grey_png(3)),
            ("3.json", br#"{"caption": "no class here"}"#.to_vec()),
            ("3.txt", b"zebra".to_vec()),
        ],
    );
    let data = open(&all(&path), 1, 0).unwrap();
    assert_eq!(data.classes, ["ant", "zebra"]);
    assert_eq!(samples(&*data.train), [(1, 1), (0, 2), (1, 3)]);
}

fn labelled(value: u8, class: u8) -> [(String, Vec<u8>); 2] {
    [
        (format!("{value:04}.png"), grey_png(value)),
        (format!("{value:04}.cls"), class.to_string().into_bytes()),
    ]
}

fn web_shard(path: impl AsRef<Path>, values: std::ops::Range<u8>) {
    let members: Vec<_> = values.flat_map(|v| labelled(v, v % 2)).collect();
    let members: Vec<(&str, Vec<u8>)> = members.iter().map(|(n, d)| (n.as_str(), d.clone())).collect();
    shard(path, &members);
}

#[test]
fn patterns_folders_and_parts() {
    let dir = tempdir().unwrap();
    let root = dir.path();
    for n in 0..3u8 {
        web_shard(root.join(format!("train-{n:03}.tar")), 4 * n..4 * n + 4);
    }
    web_shard(root.join("val-000.tar"), 100..102);
    let expected = |values: &[u8]| values.iter().map(|&v| (usize::from(v % 2), v)).collect::<Vec<_>>();
    let data = open_auto(root);
    assert_eq!(samples(&*data.train), expected(&(0..12).collect::<Vec<_>>()));
    assert_eq!(samples(&*data.validation), expected(&[100, 101]));

    let data = open(&all(root.join("train-{001..002}.tar")), 1, 0).unwrap();
    assert_eq!(samples(&*data.train), expected(&(4..12).collect::<Vec<_>>()));
    let both = format!("{0}/train-{{000..001}}.tar::{0}/val-000.tar", root.display());
    let data = open_auto(both);
    assert_eq!((data.train.len(), data.validation.len()), (8, 2));
    assert_refused(
        open(&config(root.join("train-{000..003}.tar")), 1, 0),
        &["train-003.tar", "no such tar file"],
    );
    assert_refused(open(&config(root.join("train-{a..b}.tar")), 1, 0), &["two numbers", "{000..127}"]);

    // A shard that belongs to neither part must not slip into training.
    web_shard(root.join("extra.tar"), 50..52);
    assert_refused(open(&config(root), 1, 0), &["extra.tar", "named train or val"]);

    let nested = root.join("nested");
    web_shard(nested.join("train/000.tar"), 0..4);
    web_shard(nested.join("val/000.tar"), 4..6);
    write(nested.join("classes.txt"), "even\nodd\n");
    let data = open_auto(&nested);
    assert_eq!(
        (data.train.len(), data.validation.len(), data.classes),
        (4, 2, vec!["even".into(), "odd".into()])
    );
}

#[test]
fn class_folders_in_tars() {
    let dir = tempdir().unwrap();
    let root = dir.path();
    let train = |prefix: &str| {
        let name = |rest: &str| format!("{prefix}{rest}");
        [
            (name("dog/1.v2.png"), grey_png(1)),
            (name("cat/1.png"), grey_png(2)),
            (name("dog/deep/2.png"), grey_png(3)),
        ]
    };
    let refs = |members: &[(String, Vec<u8>)]| -> Vec<u8> {
        tar_of(&members.iter().map(|(n, d)| (n.as_str(), d.clone())).collect::<Vec<_>>())
    };
    // The layout of two tar files that hold train/<class> and val/<class>.
    write(root.join("pair/set-train.tar"), refs(&train("train/")));
    shard(root.join("pair/set-val.tar"), &[("val/dog/9.png", grey_png(9))]);
    let data = open_auto(root.join("pair"));
    assert_eq!(data.classes, ["cat", "dog"]);
    assert_eq!(samples(&*data.train), [(1, 1), (0, 2), (1, 3)]);
    assert_eq!(samples(&*data.validation), [(1, 9)]);

    // One file, with or without folders around the classes; a label-like file changes nothing.
    for prefix in ["", "./", "set/images/", "train/"] {
        let mut members = train(prefix).to_vec();
        members.push((format!("{prefix}README.txt"), b"hello".to_vec()));
        write(root.join("one.tar"), refs(&members));
        let data = open(&all(root.join("one.tar")), 1, 0).unwrap();
        assert_eq!(data.classes, ["cat", "dog"], "{prefix}");
        assert_eq!(samples(&*data.train), [(1, 1), (0, 2), (1, 3)], "{prefix}");
    }
    // Both parts in one file under a common folder.
    shard(
        root.join("both.tar"),
        &[
            ("set/train/cat/1.png", grey_png(1)),
            ("set/train/dog/1.png", grey_png(2)),
            ("set/val/cat/2.png", grey_png(3)),
        ],
    );
    let data = open_auto(root.join("both.tar"));
    assert_eq!((samples(&*data.train), samples(&*data.validation)), (vec![(0, 1), (1, 2)], vec![(0, 3)]));
}

#[test]
fn long_paths() {
    let dir = tempdir().unwrap();
    let long = format!("{}/{}.png", "c".repeat(120), "x".repeat(150));
    shard(dir.path().join("l.tar"), &[(&long, grey_png(5))]);
    let data = open(&all(dir.path().join("l.tar")), 1, 0).unwrap();
    assert_eq!(data.classes, ["c".repeat(120)]);
    assert_eq!(samples(&*data.train), [(0, 5)]);
}

#[test]
fn cut_tars_are_refused_at_every_block() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("train-000.tar");
    let members: Vec<_> = (0..3).map(|i| (["a/1.png", "b/2.png", "b/3.png"][i], grey_png(i as u8))).collect();
    let whole = tar_of(&members);
    let used = 3 * 1024;
    assert_eq!(whole.len(), used + 1024);
    for length in (0..used + 512).step_by(100) {
        write(&path, &whole[..length]);
        let next = length / 1024 * 1024;
        let at = if length % 1024 < 512 { next } else { next + 512 };
        let parts = ["train-000.tar", &format!("cut at byte {length}"), "copy or fetch the shard again"];
        assert_refused(open(&all(&path), 1, 0), &parts);
        if length < used {
            assert_refused(open(&all(&path), 1, 0), &[&format!("at byte {at} is incomplete")]);
        }
    }
    write(&path, &whole[..used + 512]);
    assert_eq!(open(&all(&path), 1, 0).unwrap().train.len(), 3);
}

#[test]
fn wrong_tars_are_refused() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("s.tar");
    let refused = |parts: &[&str]| assert_refused(open(&config(&path), 1, 0), parts);
    let text = |text: &str| text.as_bytes().to_vec();

    refused(&["s.tar", "no such tar file"]);
    write(&path, "no tar at all ".repeat(200));
    refused(&["s.tar", "no valid tar header behind byte 0"]);
    shard(&path, &[("readme.md", text("x"))]);
    refused(&["holds no JPEG, PNG or WebP image"]);
    shard(&path, &[("1.png", grey_png(0))]);
    refused(&["s.tar member 1.png", "neither a label member", "class folder"]);
    shard(&path, &[("1.png", grey_png(0)), ("1.cls", text("0")), ("2.png", grey_png(0))]);
    refused(&["s.tar member 2.png", "there is no label", ".cls, .txt or .json"]);
    shard(&path, &[("1.png", grey_png(0)), ("1.cls", text("cat"))]);
    refused(&["s.tar", "member 1.cls holds `cat`", "a class number"]);
    shard(&path, &[("1.png", grey_png(0)), ("1.cls", text("-1"))]);
    refused(&["member 1.cls holds `-1`"]);
    shard(&path, &[("1.png", grey_png(0)), ("1.cls", text("99999999"))]);
    refused(&["label 99999999", "limit of 1048576 classes"]);
    shard(&path, &[("1.png", grey_png(0)), ("1.json", text(r#"{"label": [1]}"#))]);
    refused(&["member 1.json", "a number from 0 or a name"]);
    shard(
        &path,
        &[("1.png", grey_png(0)), ("1.cls", text("0")), ("2.png", grey_png(0)), ("2.txt", text("cat"))],
    );
    refused(&["some labels are numbers and some are names"]);
    shard(&path, &[("1.png", grey_png(0)), ("1.jpg", grey_png(0)), ("1.cls", text("0"))]);
    refused(&["member 1.jpg", "second image, 1.png"]);

    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    builder.append_link(&mut header, "a/1.png", "2.png").unwrap();
    write(&path, builder.into_inner().unwrap());
    refused(&["member a/1.png is a link", "--dereference"]);

    for name in ["s.tar.gz", "s.tgz", "s.tar.zst"] {
        fs::write(dir.path().join(name), "x").unwrap();
        assert_refused(open(&config(dir.path().join(name)), 1, 0), &[name, "unpack it to a plain .tar"]);
    }
    write(&path, [0x1F, 0x8B, 8, 0]);
    refused(&["gzip data", "unpack it"]);

    let set = dir.path().join("set");
    web_shard(set.join("train-0.tar"), 0..2);
    shard(set.join("val-0.tar"), &[("1.png", grey_png(0)), ("1.cls", text("5"))]);
    assert_refused(open(&config(&set), 1, 0), &["class `5`", "no training image"]);
}

#[test]
fn an_unreadable_member_is_named() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("s.tar");
    shard(&path, &[("cat/1.jpg", b"not an image".to_vec()), ("cat/2.jpg", Vec::new())]);
    let data = open(&all(&path), 1, 0).unwrap();
    assert_refused(data.train.load(0, 1), &["s.tar member cat/1.jpg", "not a JPEG, PNG or WebP"]);
    assert_refused(data.train.load(1, 1), &["s.tar member cat/2.jpg", "empty"]);
    fs::remove_file(&path).unwrap();
    assert_refused(data.train.load(0, 1), &["s.tar member cat/1.jpg", "cannot be read"]);
}
