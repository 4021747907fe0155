//! What a run has written about itself.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Result};

/// One line of a training step. Numbers that were not finite are missing.
#[derive(Clone, Debug, Deserialize)]
pub struct Step {
    /// Steps that were completed, this one included.
    pub step: u64,
    /// Mean training loss.
    pub loss: Option<f64>,
    /// Share of the images that were recognised.
    pub accuracy: Option<f64>,
    /// Learning rate.
    pub learning_rate: Option<f64>,
    /// Global gradient norm before clipping.
    pub grad_norm: Option<f64>,
    /// Images of the step.
    pub images: u64,
    /// Tokens that belong to an image.
    pub tokens: u64,
    /// Token rows, padding included.
    pub token_rows: u64,
    /// FLOPs that the model calls for.
    pub flop: f64,
    /// Wall time.
    pub seconds: f64,
}

/// One line of an evaluation.
#[derive(Clone, Debug, Deserialize)]
pub struct Evaluation {
    /// Steps before it.
    pub step: u64,
    /// Mean loss.
    pub loss: Option<f64>,
    /// Top-1 accuracy, 0 to 1.
    pub top1: f64,
}

/// One line of the attention of an evaluation; numbers that were not finite are missing.
#[derive(Clone, Debug, Deserialize)]
pub struct Attention {
    /// Steps before it.
    pub step: u64,
    /// Mean entropy of each block, in nats.
    pub entropy: Vec<Option<f64>>,
    /// Largest scaled score of each block.
    pub max_logit: Vec<Option<f64>>,
    /// The entropy of uniform attention.
    pub uniform_entropy: f64,
}

#[derive(Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum Line {
    Train(Step),
    Eval(Evaluation),
    Attention(Attention),
    #[serde(other)]
    Other,
}

/// (Images, FLOPs, seconds) up to a step.
pub type Total = (f64, f64, f64);

/// A run's folder, read.
#[derive(Clone, Debug)]
pub struct RunLog {
    /// The folder's name; the path where several runs have that name.
    pub name: String,
    /// Every key of the recipe, such as `train.lr`, with its value as TOML.
    pub recipe: BTreeMap<String, String>,
    /// Steps in order.
    pub steps: Vec<Step>,
    /// Evaluations in order.
    pub evaluations: Vec<Evaluation>,
    /// Attention at evaluations, in order.
    pub attention: Vec<Attention>,
    /// Results of `trencadis eval --suite` by name of the suite.
    pub suites: BTreeMap<String, Value>,
    /// Their tables by name of the suite.
    pub tables: BTreeMap<String, String>,
}

fn unreadable(path: &Path, cause: io::Error) -> Error {
    Error::file(path, format_args!("cannot be read: {cause}"))
}

fn text(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|cause| unreadable(path, cause))
}

impl RunLog {
    /// Reads the folders of runs, which get names that differ.
    ///
    /// # Errors
    /// Those of [`read`](Self::read).
    pub fn read_all(paths: &[PathBuf]) -> Result<Vec<Self>> {
        let mut runs = paths.iter().map(|path| Self::read(path)).collect::<Result<Vec<_>>>()?;
        let names: Vec<String> = runs.iter().map(|run| run.name.clone()).collect();
        for (run, path) in runs.iter_mut().zip(paths) {
            if names.iter().filter(|name| **name == run.name).count() > 1 {
                run.name = path.display().to_string();
            }
        }
        Ok(runs)
    }

    /// Reads the folder of a run.
    ///
    /// # Errors
    /// A path that is no folder of a run; metrics or results that are damaged.
    pub fn read(path: &Path) -> Result<Self> {
        let recipe = path.join("recipe.toml");
        if !recipe.is_file() {
            return Err(Error::file(
                path,
                "is not the folder of a run (it holds no recipe.toml); name one, such as runs/digits-1",
            ));
        }
        let table: toml::Table = text(&recipe)?
            .parse()
            .map_err(|cause| Error::file(&recipe, format_args!("is damaged: {cause}")))?;
        let mut keys = BTreeMap::new();
        flatten("", &table, &mut keys);
        let full = path.canonicalize().map_err(|cause| unreadable(path, cause))?;
        let name =
            full.file_name().map_or_else(|| full.display().to_string(), |n| n.to_string_lossy().into());
        let mut run = Self {
            name,
            recipe: keys,
            steps: Vec::new(),
            evaluations: Vec::new(),
            attention: Vec::new(),
            suites: BTreeMap::new(),
            tables: BTreeMap::new(),
        };
        let metrics = path.join("metrics.jsonl");
        if metrics.is_file() {
            run.read_metrics(&metrics, &text(&metrics)?)?;
        }
        run.read_suites(&path.join("eval"))?;
        Ok(run)
    }

    fn read_metrics(&mut self, path: &Path, text: &str) -> Result<()> {
        for (index, line) in text.split_inclusive('\n').enumerate() {
            // The last line of a run that is under way, or was killed, may be cut off.
            if !line.ends_with('\n') {
                break;
            }
            match serde_json::from_str(line) {
                Ok(Line::Train(step)) => self.steps.push(step),
                Ok(Line::Eval(evaluation)) => self.evaluations.push(evaluation),
                Ok(Line::Attention(attention)) => self.attention.push(attention),
                Ok(Line::Other) => {}
                Err(cause) => {
                    return Err(Error::file(
                        path,
                        format_args!("line {} is no metric line ({cause}); remove it", index + 1),
                    ));
                }
            }
        }
        Ok(())
    }

    fn read_suites(&mut self, folder: &Path) -> Result<()> {
        let Ok(entries) = fs::read_dir(folder) else { return Ok(()) };
        for entry in entries {
            let path = entry.map_err(|cause| unreadable(folder, cause))?.path();
            let Some(name) = path.file_stem().and_then(|stem| stem.to_str()).map(str::to_owned) else {
                continue;
            };
            if path.extension().is_none_or(|end| end != "json") {
                continue;
            }
            let value: Value = serde_json::from_str(&text(&path)?).map_err(|cause| {
                Error::file(&path, format_args!("is no JSON ({cause}); run the evaluation again"))
            })?;
            // Further files of a suite lie beside its own.
            if value["suite"] != name.as_str() {
                continue;
            }
            if let Ok(table) = fs::read_to_string(path.with_extension("txt")) {
                self.tables.insert(name.clone(), table);
            }
            self.suites.insert(name, value);
        }
        Ok(())
    }

    /// The evaluation with the highest accuracy.
    pub fn best(&self) -> Option<&Evaluation> {
        // Of equal ones the first, as the training loop keeps it.
        self.evaluations.iter().reduce(|best, other| if other.top1 > best.top1 { other } else { best })
    }

    /// Of each step line, (images, FLOPs, seconds) up to and including it. Steps between two lines count as the second
    /// of them.
    pub fn totals(&self) -> Vec<Total> {
        let (mut before, mut total) = (0, (0.0, 0.0, 0.0));
        let mut totals = Vec::with_capacity(self.steps.len());
        for step in &self.steps {
            let count = step.step.saturating_sub(before) as f64;
            total.0 += count * step.images as f64;
            total.1 += count * step.flop;
            total.2 += count * step.seconds;
            before = step.step;
            totals.push(total);
        }
        totals
    }
}

fn flatten(prefix: &str, table: &toml::Table, keys: &mut BTreeMap<String, String>) {
    for (key, value) in table {
        let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        match value {
            toml::Value::Table(inner) => flatten(&path, inner, keys),
            value => drop(keys.insert(path, value.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(metrics: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("recipe.toml"), "[train]\nlr = 0.001\nloss = \"softmax\"\n").unwrap();
        fs::write(dir.path().join("metrics.jsonl"), metrics).unwrap();
        dir
    }

    const STEP: &str = r#"{"step":STEP,"kind":"train","loss":null,"accuracy":0.5,"learning_rate":0.1,"grad_norm":2.0,"images":3,"tokens":90,"token_rows":100,"flop":5.0,"seconds":0.5}"#;

    #[test]
    fn a_run_is_read() {
        let line = |step: &str| STEP.replace("STEP", step) + "\n";
        let eval = |step: u64, top1: f64| {
            format!(
                "{{\"step\":{step},\"kind\":\"eval\",\"loss\":1.5,\"top1\":{top1},\"top5\":1.0,\"images\":7,\"best\":true,\"seconds\":1.0}}\n"
            )
        };
        let unknown = "{\"step\":4,\"kind\":\"entropy\",\"values\":[1]}\n";
        let attention = "{\"step\":1,\"kind\":\"attention\",\"entropy\":[2.5,null],\"min_head_entropy\":[2.0,null],\"max_logit\":[3.0,null],\"uniform_entropy\":3.5,\"images\":16,\"seconds\":0.1}\n";
        let text = line("1")
            + &eval(1, 0.7)
            + attention
            + &line("4")
            + unknown
            + &eval(4, 0.9)
            + &eval(5, 0.9)
            + "{\"step\":6,\"ki";
        let dir = folder(&text);
        let eval = dir.path().join("eval");
        fs::create_dir(&eval).unwrap();
        fs::write(eval.join("cascade.json"), r#"{"suite":"cascade","single":[]}"#).unwrap();
        fs::write(eval.join("cascade.txt"), "table").unwrap();
        fs::write(eval.join("notes.json"), "{}").unwrap();
        let run = RunLog::read(dir.path()).unwrap();
        assert_eq!((run.steps.len(), run.evaluations.len()), (2, 3));
        assert_eq!(run.steps[0].loss, None);
        assert_eq!((run.attention.len(), &run.attention[0].entropy[..]), (1, &[Some(2.5), None][..]));
        assert_eq!(run.best().map(|best| best.step), Some(4));
        assert_eq!(run.totals(), [(3.0, 5.0, 0.5), (12.0, 20.0, 2.0)]);
        assert_eq!(run.recipe["train.loss"], "\"softmax\"");
        assert_eq!(run.suites.keys().collect::<Vec<_>>(), ["cascade"]);
        assert_eq!(run.tables["cascade"], "table");
    }

    #[test]
    fn names_differ() {
        let dir = tempfile::tempdir().unwrap();
        let paths = ["a/digits-1", "b/digits-1", "b/digits-2"].map(|path| dir.path().join(path));
        for path in &paths {
            fs::create_dir_all(path).unwrap();
            fs::write(path.join("recipe.toml"), "").unwrap();
        }
        let names: Vec<String> = RunLog::read_all(&paths).unwrap().into_iter().map(|run| run.name).collect();
        let [first, second, _] = paths.map(|path| path.display().to_string());
        assert_eq!(names, [first.as_str(), second.as_str(), "digits-2"]);
    }

    #[test]
    fn what_is_no_run_or_damaged_is_named() {
        let empty = tempfile::tempdir().unwrap();
        let error = RunLog::read(empty.path()).unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains("no recipe.toml"), "{error}");
        let dir = folder("{\"step\":1}\n");
        let error = RunLog::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("metrics.jsonl") && error.contains("line 1"), "{error}");
        fs::write(dir.path().join("metrics.jsonl"), [0xff]).unwrap();
        let error = RunLog::read(dir.path()).unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains("cannot be read"), "{error}");
        fs::write(dir.path().join("metrics.jsonl"), "").unwrap();
        fs::create_dir(dir.path().join("eval")).unwrap();
        fs::write(dir.path().join("eval/x.json"), "{").unwrap();
        assert!(RunLog::read(dir.path()).unwrap_err().to_string().contains("x.json"));
    }
}
