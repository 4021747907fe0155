//! The binary from end to end, on models of a few thousand parameters.

mod bad_input;
mod device;
mod finetune;
mod inspect;
#[path = "../support/places.rs"]
mod places;
mod plan;
mod predict;
mod probes;
mod profile;
mod ranks;
mod report;
mod resume;
mod suites;
mod train;

use std::collections::BTreeMap;
use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use image::{DynamicImage, ImageFormat, RgbImage};
use tempfile::{TempDir, tempdir};
use trencadis::weights::Weights;

/// Overrides that make every recipe tiny.
const TINY: [&str; 9] = [
    "model.shape=\"\"",
    "model.width=16",
    "model.depth=1",
    "model.mlp=16",
    "model.heads=1",
    "packing.tokens=256",
    "train.steps=12",
    "train.warmup=2",
    "train.log_every=1",
];

/// A folder of its own in which the binary runs.
struct Place(TempDir);

/// What a run of the binary left.
struct Done {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Place {
    fn new() -> Self {
        Self(tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    /// `trencadis` with these words, which sees the GPU of the machine only where they ask for it.
    fn command(&self, words: &str) -> Command {
        let mut command = Command::new(places::program());
        command.args(words.split_whitespace()).current_dir(self.0.path());
        if !words.contains("cuda") {
            command.env("CUDA_VISIBLE_DEVICES", "");
        }
        command
    }

    /// `trencadis train` of a tiny model, with further options and then overrides.
    fn training(&self, words: &str, sets: &[&str]) -> Command {
        let mut command = self.command(&format!("train --threads 2 {words}"));
        for set in TINY.iter().chain(sets) {
            command.args(["--set", set]);
        }
        command
    }

    #[track_caller]
    fn run(&self, words: &str) -> Done {
        Done::of(self.command(words))
    }

    #[track_caller]
    fn train(&self, words: &str, sets: &[&str]) -> Done {
        Done::of(self.training(words, sets))
    }

    /// A tiny run on the digits, `runs/digits-1`.
    #[track_caller]
    fn trained(&self) {
        self.train("", &[]).succeeds();
    }

    /// The file of a run, tensor by tensor and with its metadata.
    fn checkpoint(&self, name: &str) -> Weights {
        Weights::load(&self.path(name)).unwrap()
    }

    /// Every tensor's bits, so that NaN and signed zeros count.
    fn bits(&self, name: &str) -> BTreeMap<String, Vec<u32>> {
        let weights = self.checkpoint(name);
        assert!(weights.tensors.len() > 10, "{name} holds a model");
        weights
            .tensors
            .into_iter()
            .map(|(name, (_, values))| (name, values.iter().map(|v| v.to_bits()).collect()))
            .collect()
    }

    /// The metric lines of a run without `seconds`.
    fn metrics(&self, run: &str) -> Vec<serde_json::Value> {
        let text = fs::read_to_string(self.path(run).join("metrics.jsonl")).unwrap();
        text.lines()
            .map(|line| {
                let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
                assert!(line.as_object_mut().unwrap().remove("seconds").unwrap().is_number());
                line
            })
            .collect()
    }

    /// Names of the run folders.
    fn runs(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path("runs")) else { return Vec::new() };
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// `root/a/*.png` and `root/b/*.png`, told apart by their colour.
    fn photos(&self, root: &str, each: usize) {
        for (class, red) in [("a", 220), ("b", 30)] {
            for i in 0..each {
                let image = picture(20 + 7 * (i as u32 % 5), 24, red);
                self.write(&format!("{root}/{class}/{i}.png"), encode(&image.into(), ImageFormat::Png));
            }
        }
    }
}

impl Done {
    #[track_caller]
    fn of(mut command: Command) -> Self {
        let Output { status, stdout, stderr } = command.output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { code: status.code(), out: text(stdout), err: text(stderr) }
    }

    #[track_caller]
    fn succeeds(self) -> Self {
        assert_eq!(self.code, Some(0), "{}\n{}", self.out, self.err);
        self
    }

    /// Exit code 2 and nothing but one sentence, which holds every part.
    #[track_caller]
    fn refuses(self, parts: &[&str]) -> Self {
        assert_eq!(self.code, Some(2), "{}\n{}", self.out, self.err);
        assert_eq!(self.err.lines().count(), 1, "one sentence and no more: {}", self.err);
        assert!(self.err.starts_with("error: "), "{}", self.err);
        self.says_err(parts)
    }

    #[track_caller]
    fn says(self, parts: &[&str]) -> Self {
        for part in parts {
            assert!(self.out.contains(part), "`{part}` is missing in: {}", self.out);
        }
        self
    }

    #[track_caller]
    fn says_err(self, parts: &[&str]) -> Self {
        for part in parts {
            assert!(self.err.contains(part), "`{part}` is missing in: {}", self.err);
        }
        self
    }
}

fn picture(width: u32, height: u32, red: u8) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| image::Rgb([red, (9 * x) as u8, (7 * y) as u8]))
}

fn encode(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// The JSON of each line.
fn json_lines(text: &str) -> Vec<serde_json::Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn exists(path: impl AsRef<Path>) -> bool {
    path.as_ref().exists()
}
